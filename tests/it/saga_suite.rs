//! The suite every saga passes, on this service's flow, on one made up, and on broken ones.

mod orders;

use std::time::Duration;

use auth_service::{
    config::SilencePolicy,
    db::{
        sessions::{self, NewSession, NewToken},
        users::{self, NewUser},
    },
    domain::{Email, Username},
    participants::Participants,
};
use outbox_relay::{Database, PoolSettings, test_kit::Courier};
use saga_orchestrator::{
    NewSaga, Orchestrator, Saga, Status,
    deadlines::SweepCursor,
    flows::create_user,
    store,
    suite::{self, Failure, Subject},
};
use serde_json::Value;
use sqlx::{PgConnection, PgPool, postgres::PgPoolOptions};
use uuid::Uuid;

use self::orders::{Mistake, Orders};
use crate::support::{eventually, parts::PARTS};

async fn pool() -> PgPool {
    // Thousands of short transactions: a ping before each would double them.
    let options = PgPoolOptions::new().test_before_acquire(false);
    options.connect_with(PARTS.connect_options(&PARTS.database().await)).await.unwrap()
}

/// An orchestrator's own connections to the same database.
fn database(pool: &PgPool) -> Database {
    let settings = PoolSettings {
        connections: 5,
        acquire_timeout: Duration::from_secs(30),
        work_timeout: Duration::from_secs(30),
        session: &[],
    };
    Database::new(pool.connect_options().as_ref().clone(), settings)
}

/// A registration.
struct Registration;

impl Subject for Registration {
    async fn begin(&self, conn: &mut PgConnection) -> Result<NewSaga, sqlx::Error> {
        let saga_id = Uuid::now_v7();
        let name = format!("u{}", &saga_id.simple().to_string()[12..]);
        let (username, email) =
            (Username::parse(&name).unwrap(), Email::parse(&format!("{name}@example.com")).unwrap());
        let new = NewUser { username: &username, email: &email, password_hash: "none", create_saga_id: saga_id };
        let (user, _) = users::insert(conn, &new).await?;
        let life = Duration::from_secs(86_400);
        let token = NewToken { jti: Uuid::new_v4(), kid: "none", life };
        let session = NewSession { session_id: Uuid::new_v4(), user_id: user.id, token, life, user_agent: None };
        sessions::insert(conn, &session).await?;
        Ok(NewSaga {
            saga_id,
            subject: user.id.to_string(),
            data: create_user::data(i64::from(user.id.0), &user.username, &user.email),
            correlation_id: Uuid::new_v4().to_string(),
            correlation_given: false,
            traceparent: None,
        })
    }

    async fn local(&self, conn: &mut PgConnection) -> Result<Value, sqlx::Error> {
        sqlx::query_scalar(
            "select jsonb_build_object(
                        'users', (select jsonb_agg(to_jsonb(u) order by u.id) from auth_users u),
                        'sessions', (select jsonb_agg(to_jsonb(s) order by s.id) from refresh_tokens s))",
        )
        .fetch_one(conn)
        .await
    }

    async fn is_complete(&self, conn: &mut PgConnection, saga: &Saga) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar("select exists (select from auth_users where create_saga_id = $1 and status = 'active')")
            .bind(saga.saga_id)
            .fetch_one(conn)
            .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_passes() {
    let participants = Participants::new(None, SilencePolicy::Stuck);
    let proof = suite::prove(&pool().await, &create_user::DEFINITION, participants, Registration).await;
    assert!(proof.cases > 60 && proof.messages > 180, "{proof:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flow_of_three_steps_passes() {
    let pool = orders::shop(pool().await).await;
    let proof = suite::prove(&pool, &orders::DEFINITION, Orders::new(None), Orders::new(None)).await;
    assert!(proof.cases > 190 && proof.messages > 1200, "{proof:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_became_of_one_command_does_not_start_the_clock_of_the_next() {
    let pool = orders::shop(pool().await).await;
    let sagas = orders::sagas();
    let saga_id = commanded(&pool, &sagas).await;
    let mut conn = pool.acquire().await.unwrap();
    let old = "update saga_state set updated_at = updated_at - interval '1 minute'";
    sqlx::query(old).execute(&mut *conn).await.unwrap();

    // In a queue for the saga's row: the reply that moves it on, and behind it a sweep that has read
    // it before.
    let mut lock = pool.begin().await.unwrap();
    sqlx::query("select from saga_state for update").execute(&mut *lock).await.unwrap();
    let reply = {
        let (sagas, db, done) = (sagas.clone(), database(&pool), orders::answer("stock.reserved", saga_id));
        tokio::spawn(async move { sagas.receive(&db, &done).await })
    };
    until_waiting(&pool, 1).await;
    let sweep = {
        let (sagas, db) = (sagas.clone(), database(&pool));
        tokio::spawn(async move { sagas.sweep(&db, &mut SweepCursor::default()).await })
    };
    until_waiting(&pool, 2).await;
    lock.rollback().await.unwrap();
    reply.await.unwrap().unwrap();
    sweep.await.unwrap().unwrap();

    let saga = store::find(&mut conn, saga_id).await.unwrap().unwrap();
    assert_eq!((saga.status, saga.step.as_str()), (Status::Running, "charge"));
    assert_eq!(saga.deadline_at, None, "its command is not out yet");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_undo_leaves_its_saga_stuck_whatever_else_is_parked() {
    let pool = orders::shop(pool().await).await;
    let sagas = orders::sagas();
    let saga_id = commanded(&pool, &sagas).await;
    let mut conn = pool.acquire().await.unwrap();
    sagas.receive(&database(&pool), &orders::answer("stock.not-reserved", saga_id)).await.unwrap();
    // The undo can't be sent; nor can that of a saga which only a newer program knows, and which comes first.
    sqlx::raw_sql(
        "insert into outbox_parked (id, lane, key, seq, message_id, topic, payload, headers, saga_id, created_at, reason)
         select id, lane, key, seq, message_id, topic, payload, headers, saga_id, created_at, 'too large' from outbox
         union all
         select 0, 0, 'x', 1, gen_random_uuid(), 't', '', '{}', gen_random_uuid(), now(), 'too large';
         delete from outbox;
         insert into saga_state (saga_id, name, definition_version, status, step, subject, data, correlation_id,
                                 evidence, finished_at, undone)
         select saga_id, 'of tomorrow', 1, 'compensated', 's', 'x', '{}', 'c', 'reply', now(), true
           from outbox_parked where id = 0",
    )
    .execute(&mut *conn)
    .await
    .unwrap();
    sagas.sweep(&database(&pool), &mut SweepCursor::default()).await.unwrap();

    let saga = store::find(&mut conn, saga_id).await.unwrap().unwrap();
    assert_eq!(saga.status, Status::Stuck);
    assert!(saga.stuck_reason.as_deref().unwrap().contains("can't be sent: too large"), "{:?}", saga.stuck_reason);
}

/// A saga whose first command is out.
async fn commanded(pool: &PgPool, sagas: &Orchestrator<Orders>) -> Uuid {
    let mut tx = pool.begin().await.unwrap();
    let new = Orders::new(None).begin(&mut tx).await.unwrap();
    let saga_id = new.saga_id;
    sagas.start(&mut tx, &orders::DEFINITION, new).await.unwrap();
    tx.commit().await.unwrap();
    let mut conn = pool.acquire().await.unwrap();
    Courier::hire(&mut conn).await.unwrap().take_out(&mut conn).await.unwrap();
    saga_id
}

async fn until_waiting(pool: &PgPool, sessions: i64) {
    eventually(&format!("{sessions} sessions wait for a lock"), || async {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
        )
        .fetch_one(pool)
        .await
        .unwrap();
        (waiting == sessions).then_some(())
    })
    .await
}

/// What the suite has to say about a flow with this mistake in it.
async fn failures_of(mistake: Mistake) -> Vec<Failure> {
    let pool = orders::shop(pool().await).await;
    let flow = Orders::on(&pool, Some(mistake));
    let proof = suite::try_prove(&pool, mistake.definition(), flow, Orders::new(Some(mistake))).await;
    proof.expect_err("a broken flow does not pass")
}

fn told(failures: &[Failure]) -> String {
    failures.iter().map(|failure| format!("{failure}\n")).collect()
}

#[track_caller]
fn assert_told(failures: &[Failure], case: &str, what: &str) {
    let found = failures.iter().any(|failure| failure.to_string().contains(case) && failure.what.contains(what));
    assert!(found, "{case:?} … {what:?} is not among\n{}", told(failures));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compensation_that_forgets_to_delete_is_told() {
    let failures = failures_of(Mistake::ForgetsToDelete).await;
    assert_told(&failures, "order, step reserve, refused", "it is taken back, and here is not what was before");
    assert!(!told(&failures).contains("order, completes"), "{}", told(&failures));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_counts_twice_is_told() {
    let failures = failures_of(Mistake::CountsEveryCompletion).await;
    assert_told(&failures, "order, completes", "`complete`, called twice, changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_does_nothing_is_told() {
    let failures = failures_of(Mistake::CompletesNothing).await;
    assert_told(&failures, "order, completes", "it is completed, and `is_complete` says that it is not");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compensation_that_takes_others_with_it_is_told() {
    let failures = failures_of(Mistake::DeletesOthersToo).await;
    assert_told(&failures, "order, step reserve, refused", "it is taken back, and here is not what was before");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compensation_that_will_not_is_told() {
    let failures = failures_of(Mistake::WillNotTakeBack).await;
    assert_told(
        &failures,
        "order, step reserve, refused, the refusal naming it by the saga-id header",
        "the saga is stuck (\"not today\"), and no undo is refused",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn work_outside_the_transaction_is_told() {
    let failures = failures_of(Mistake::WorksOutsideTheTransaction).await;
    assert_told(&failures, "the database fails in the middle", "a transaction that failed left something behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_undo_on_another_steps_topic_is_told() {
    let failures = failures_of(Mistake::UndoOnAnotherTopic).await;
    assert_eq!(
        told(&failures),
        "order, step charge, as it is defined: \
         the topic \"stock.release\" of its undo command is also that of the undo command of step reserve\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_is_no_object_is_told() {
    let failures = failures_of(Mistake::PayloadIsText).await;
    assert_told(&failures, "order, completes", "a reply on \"stock.reserved\" made the flow panic");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subject_that_shows_nothing_is_told() {
    let failures = failures_of(Mistake::ShowsNothing).await;
    assert_told(&failures, "order, completes", "`local` does not show what `begin` has changed");
}
