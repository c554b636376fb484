//! A flow made up for the suite: an order is reserved, charged and announced. And what its author
//! could have got wrong.

use std::time::Duration;

use outbox_relay::{Wake, inbox::Bytes};
use saga_orchestrator::{
    Definition, Flows, LocalOutcome, NewSaga, Orchestrator, Recourse, Saga, SagaSettings, Settlement,
    definition::{Command, Step, Undo},
    reply::Received,
    suite::Subject,
};
use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

const fn reserve(command: Command) -> Step {
    Step {
        name: "reserve",
        command,
        done: "stock.reserved",
        refused: "stock.not-reserved",
        either: None,
        undo: Undo::Command {
            command: Command { topic: "stock.release", payload: only_id },
            done: "stock.released",
            refused: "stock.not-released",
        },
    }
}

const fn charge(command: Command, undo: &'static str) -> Step {
    Step {
        name: "charge",
        command,
        done: "payment.charged",
        refused: "payment.not-charged",
        either: Some("payment.reply"),
        undo: Undo::Command {
            command: Command { topic: undo, payload: only_id },
            done: "payment.refunded",
            refused: "payment.not-refunded",
        },
    }
}

const ANNOUNCE: Step = Step {
    name: "announce",
    command: Command { topic: "mail.send", payload: whole_order },
    done: "mail.sent",
    refused: "mail.not-sent",
    either: None,
    undo: Undo::Nothing { because: "a letter can't be unsent; a second one says so" },
};

const RESERVE: Command = Command { topic: "stock.reserve", payload: whole_order };
const CHARGE: Command = Command { topic: "payment.charge", payload: whole_order };

/// Two steps that can be undone, and one that can't.
pub static DEFINITION: Definition =
    Definition { name: "order", version: 1, steps: &[reserve(RESERVE), charge(CHARGE, "payment.refund"), ANNOUNCE] };

static UNDO_ON_ANOTHER_TOPIC: Definition =
    Definition { name: "order", version: 1, steps: &[reserve(RESERVE), charge(CHARGE, "stock.release"), ANNOUNCE] };

static PAYLOAD_IS_TEXT: Definition = Definition {
    name: "order",
    version: 1,
    steps: &[
        reserve(RESERVE),
        charge(Command { topic: "payment.charge", payload: only_text }, "payment.refund"),
        ANNOUNCE,
    ],
};

fn whole_order(data: &Value) -> Value {
    data.clone()
}

fn only_id(data: &Value) -> Value {
    json!({ "id": data["id"] })
}

fn only_text(data: &Value) -> Value {
    json!(data["id"].to_string())
}

/// What its author could have got wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    ForgetsToDelete,
    DeletesOthersToo,
    WillNotTakeBack,
    CountsEveryCompletion,
    CompletesNothing,
    WorksOutsideTheTransaction,
    UndoOnAnotherTopic,
    PayloadIsText,
    ShowsNothing,
}

impl Mistake {
    pub fn definition(self) -> &'static Definition {
        match self {
            Mistake::UndoOnAnotherTopic => &UNDO_ON_ANOTHER_TOPIC,
            Mistake::PayloadIsText => &PAYLOAD_IS_TEXT,
            _ => &DEFINITION,
        }
    }
}

/// The flow's local side, and its subject.
pub struct Orders {
    mistake: Option<Mistake>,
    elsewhere: Option<PgPool>,
}

/// Runs orders, for tests that go their own way.
pub fn sagas() -> Orchestrator<Orders> {
    static ALL: &[&Definition] = &[&DEFINITION];
    let settings = SagaSettings {
        source: "shop".to_owned(),
        topic_prefix: String::new(),
        participant: "payment".to_owned(),
        step_timeout: Duration::from_secs(60),
        ask_timeout: Duration::from_secs(1),
        resolve_backoff: Duration::from_secs(1),
        reply_clock_tolerance: Duration::from_secs(60),
        resolve_attempts: 1,
    };
    Orchestrator::new(settings, ALL, Orders::new(None), Wake::default())
}

/// The stock's answer to the first command, on this topic.
pub fn answer(topic: &str, saga_id: Uuid) -> Received {
    Received {
        topic: topic.to_owned(),
        partition: 0,
        offset: 0,
        kafka_at: None,
        cluster_id: "none".to_owned(),
        bytes: Bytes {
            headers: vec![("saga-id".to_owned(), Some(saga_id.to_string().into_bytes()))],
            payload: Some(b"{}".to_vec()),
            ..Bytes::default()
        },
    }
}

/// A database with a table for orders in it.
pub async fn shop(pool: PgPool) -> PgPool {
    sqlx::raw_sql(
        "create table orders (
             id      bigint generated always as identity primary key,
             saga_id uuid not null,
             status  text not null,
             shipped integer not null default 0
         );
         insert into orders (saga_id, status) values (gen_random_uuid(), 'of another flow');",
    )
    .execute(&pool)
    .await
    .unwrap();
    pool
}

impl Orders {
    pub fn new(mistake: Option<Mistake>) -> Self {
        Self { mistake, elsewhere: None }
    }

    pub fn on(pool: &PgPool, mistake: Option<Mistake>) -> Self {
        Self { mistake, elsewhere: Some(pool.clone()) }
    }

    fn makes(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }
}

impl Flows for Orders {
    async fn complete(&self, conn: &mut PgConnection, saga: &Saga) -> Result<LocalOutcome, sqlx::Error> {
        let sql = match self.mistake {
            Some(Mistake::CompletesNothing) => return Ok(LocalOutcome::Applied),
            Some(Mistake::CountsEveryCompletion) => {
                "update orders set status = 'complete', shipped = shipped + 1 where saga_id = $1"
            }
            _ => {
                "update orders set status = 'complete', shipped = shipped + 1
                  where saga_id = $1 and status = 'pending'"
            }
        };
        match self.elsewhere.as_ref().filter(|_| self.makes(Mistake::WorksOutsideTheTransaction)) {
            Some(pool) => sqlx::query(sql).bind(saga.saga_id).execute(pool).await?,
            None => sqlx::query(sql).bind(saga.saga_id).execute(conn).await?,
        };
        Ok(LocalOutcome::Applied)
    }

    async fn compensate(&self, conn: &mut PgConnection, saga: &Saga) -> Result<LocalOutcome, sqlx::Error> {
        let sql = match self.mistake {
            Some(Mistake::ForgetsToDelete) => return Ok(LocalOutcome::Applied),
            Some(Mistake::WillNotTakeBack) => return Ok(LocalOutcome::Impossible("not today".to_owned())),
            Some(Mistake::DeletesOthersToo) => "delete from orders where saga_id = $1 or status <> 'complete'",
            _ => "delete from orders where saga_id = $1 and status = 'pending'",
        };
        sqlx::query(sql).bind(saga.saga_id).execute(conn).await?;
        Ok(LocalOutcome::Applied)
    }

    fn recourse(&self) -> Recourse {
        Recourse::NeedsOperator
    }

    async fn ask(&self, _: &Saga) -> Settlement {
        Settlement::NoAnswer("there is nobody to ask".to_owned())
    }
}

impl Subject for Orders {
    async fn begin(&self, conn: &mut PgConnection) -> Result<NewSaga, sqlx::Error> {
        let saga_id = Uuid::now_v7();
        let id: i64 = sqlx::query_scalar("insert into orders (saga_id, status) values ($1, 'pending') returning id")
            .bind(saga_id)
            .fetch_one(conn)
            .await?;
        Ok(NewSaga {
            saga_id,
            subject: id.to_string(),
            data: json!({ "id": id, "article": "teapot" }),
            correlation_id: Uuid::new_v4().to_string(),
            correlation_given: false,
            traceparent: None,
        })
    }

    async fn local(&self, conn: &mut PgConnection) -> Result<Value, sqlx::Error> {
        if self.makes(Mistake::ShowsNothing) {
            return Ok(Value::Null);
        }
        sqlx::query_scalar("select jsonb_agg(to_jsonb(o) order by o.id) from orders o").fetch_one(conn).await
    }

    async fn is_complete(&self, conn: &mut PgConnection, saga: &Saga) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar("select exists (select from orders where saga_id = $1 and status = 'complete')")
            .bind(saga.saga_id)
            .fetch_one(conn)
            .await
    }
}
