//! What the replaced service left behind.

use std::sync::LazyLock;

use auth_service::{app::Role, migrations};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};

use super::{
    TestService,
    parts::PARTS,
    service::{Wishes, base_vars},
};

/// What `sequelize.sync()` sends for the two models. An RS256 token does not fit into 255
/// characters, so that column was a `TEXT`.
const SEQUELIZE: &str = r#"
    CREATE TABLE IF NOT EXISTS "auth_users" ("id" SERIAL, "username" VARCHAR(255) NOT NULL UNIQUE,
        "email" VARCHAR(255) NOT NULL UNIQUE, "password_hash" VARCHAR(255) NOT NULL,
        "is_verified" BOOLEAN DEFAULT false, "createdAt" TIMESTAMP WITH TIME ZONE NOT NULL,
        "updatedAt" TIMESTAMP WITH TIME ZONE NOT NULL, PRIMARY KEY ("id"));
    CREATE TABLE IF NOT EXISTS "refresh_tokens" ("id" SERIAL,
        "user_id" INTEGER NOT NULL REFERENCES "auth_users" ("id") ON DELETE NO ACTION ON UPDATE CASCADE,
        "token" TEXT NOT NULL, "createdAt" TIMESTAMP WITH TIME ZONE NOT NULL,
        "updatedAt" TIMESTAMP WITH TIME ZONE NOT NULL, PRIMARY KEY ("id"));"#;

/// Made by bcryptjs 3, whose predecessors wrote `$2a$`, of "a long enough secret".
pub const BCRYPTJS: &str = "$2b$10$cS8raUshWSd8Hm2ICf5HbuFKB/aAycVO3wX28hbSgqf7xW5EX1dpq";
pub const BCRYPTJS_2: &str = "$2a$04$pgg3rJkfc76ooLxoDKrzpODxJE4JzGWEYXMw3AWuc28ERAcG7ZS.K";

/// One second for all sign-ins of a run.
static NOW: LazyLock<i64> = LazyLock::new(|| chrono::Utc::now().timestamp());

/// A database of the original fleet.
pub struct Original {
    pub database: String,
    pub db: PgPool,
}

impl Original {
    pub async fn new() -> Self {
        let database = PARTS.bare_database().await;
        let db = PgPool::connect_lazy_with(PARTS.connect_options(&database));
        sqlx::raw_sql(SEQUELIZE).execute(&db).await.expect("the tables");
        Self { database, db }
    }

    pub async fn user(&self, username: &str, email: &str, hash: &str) -> i32 {
        sqlx::query_scalar(
            r#"INSERT INTO "auth_users" ("id","username","email","password_hash","is_verified","createdAt","updatedAt")
               VALUES (DEFAULT,$1,$2,$3,true,'2024-02-29 12:00:00+00','2024-03-01 12:00:00+00') RETURNING "id""#,
        )
        .bind(username)
        .bind(email)
        .bind(hash)
        .fetch_one(&self.db)
        .await
        .expect("the user")
    }

    /// A session, as a login of the original stored it. Answers with its token.
    pub async fn session(&self, user_id: i32, seconds_ago: i64) -> String {
        let vars = base_vars(&self.database, "");
        let pem = vars.iter().find(|(name, _)| name == "REFRESH_TOKEN_PRIVATE_KEY").map(|(_, pem)| pem).unwrap();
        let iat = *NOW - seconds_ago;
        let claims = json!({ "id": user_id, "iat": iat, "exp": iat + 7 * 86_400 });
        let key = EncodingKey::from_rsa_pem(pem.as_bytes()).unwrap();
        let token = jsonwebtoken::encode(&Header::new(Algorithm::RS256), &claims, &key).unwrap();
        sqlx::query(
            r#"INSERT INTO "refresh_tokens" ("id","user_id","token","createdAt","updatedAt")
               VALUES (DEFAULT,$1,$2,now(),now())"#,
        )
        .bind(user_id)
        .bind(&token)
        .execute(&self.db)
        .await
        .expect("the session");
        token
    }

    pub async fn migrate(&self) -> Result<usize, String> {
        let migrated = migrations::run(&PARTS.connect_options(&self.database)).await;
        migrated.map(|migrated| migrated.applied).map_err(|error| error.to_string())
    }

    pub async fn adopted(&self) -> TestService {
        assert!(self.migrate().await.expect("adopted") > 0);
        TestService::with(Wishes {
            roles: Some(vec![Role::Http, Role::Grpc]),
            vars: vec![("REST_REFRESH_ENABLED", "true".to_owned())],
            beside: Some((self.database.clone(), String::new())),
            no_topics: true,
        })
        .await
    }

    /// Every table, with its columns, constraints, indexes and rows, down to who wrote them.
    pub async fn everything(&self) -> Value {
        let tables: Vec<String> = sqlx::query_scalar(
            "select relname::text from pg_class
              where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') order by 1",
        )
        .fetch_all(&self.db)
        .await
        .unwrap();
        let mut all = json!({});
        for table in tables {
            let sql = format!(
                r#"select jsonb_build_object(
                    'columns', (select jsonb_agg(to_jsonb(c) order by ordinal_position)
                                  from information_schema.columns c where table_name = '{table}'),
                    'constraints', (select jsonb_agg(conname || ' ' || pg_get_constraintdef(oid) order by conname)
                                      from pg_constraint where conrelid = '"{table}"'::regclass),
                    'indexes', (select jsonb_agg(indexdef order by indexdef) from pg_indexes where tablename = '{table}'),
                    'rows', (select jsonb_agg(to_jsonb(t) || jsonb_build_object('xmin', xmin::text)
                                              order by to_jsonb(t)) from "{table}" t))"#
            );
            all[&table] = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&self.db).await.unwrap();
        }
        all
    }
}
