//! Silence. A deadline begins to run when its command is in Kafka, so that a broker that is away is
//! not silence; when it has passed, the saga first says that it is being looked into, then the
//! other service is asked, and only its answer (or the configured policy) closes the saga.
//!
//! The sweep has a loop of its own and is not left to the scheduler: that a saga comes to rest hangs
//! on it, and repeated jobs of cron schedulers have been seen to stop under load.

use std::{collections::HashMap, time::Duration};

use outbox_relay::{Database, Publication, fault_points, parked_of_sagas, publications};
use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    journal::EventSource,
    machine::{Event, Recourse, Settlement},
    orchestrator::{Flows, Handled, Orchestrator, SagaError, message_id},
    state::{Saga, Status},
    store::{self, Unpublished},
};

const BATCH: i64 = 500;
/// Questions under way at once: enough to work off an outage, not enough to start one.
const ASKING_AT_ONCE: usize = 8;

/// Where the look at the outbox goes on; see [`Orchestrator::sweep`].
#[derive(Debug, Default)]
pub struct SweepCursor {
    commands: i64,
    parked: i64,
}

impl<F: Flows> Orchestrator<F> {
    /// Sweeps every `every` until `shutdown`.
    pub async fn watch_deadlines(self, db: Database, every: Duration, shutdown: CancellationToken) {
        let mut cursor = SweepCursor::default();
        while !shutdown.is_cancelled() {
            match self.sweep(&db, &mut cursor).await {
                Ok(looked_into) if looked_into as i64 >= BATCH => continue,
                Ok(_) => metrics::gauge!("saga_sweep_last_success_seconds").set(chrono::Utc::now().timestamp() as f64),
                Err(error) => tracing::warn!(%error, "deadlines could not be looked at; trying again"),
            }
            shutdown.run_until_cancelled(sleep(every)).await;
        }
    }

    /// One round: start the clocks of commands that are out, then look into what is overdue. Several
    /// replicas may sweep at once. Answers how many overdue sagas were looked into.
    pub async fn sweep(&self, db: &Database, cursor: &mut SweepCursor) -> Result<usize, SagaError> {
        self.follow_commands(db, &mut cursor.commands).await?;
        self.follow_undos(db, &mut cursor.parked).await?;
        let overdue = db.run(|conn| Box::pin(store::overdue(conn, BATCH))).await?;
        let count = overdue.len();
        let mut asking = JoinSet::new();
        for saga_id in overdue {
            if asking.len() >= ASKING_AT_ONCE {
                asking.join_next().await;
            }
            let (orchestrator, db) = (self.clone(), db.clone());
            asking.spawn(async move {
                if let Err(error) = orchestrator.look_into(&db, saga_id).await {
                    tracing::warn!(saga.id = %saga_id, %error, "a silent saga could not be looked into; trying again");
                }
            });
        }
        while asking.join_next().await.is_some() {}
        Ok(count)
    }

    /// Asks the outbox what became of commands. The cursor goes round, so that rows that stay (a
    /// paused topic's, say) never keep the others from being looked at.
    async fn follow_commands(&self, db: &Database, cursor: &mut i64) -> Result<(), SagaError> {
        let from = *cursor;
        let (waiting, what_became) = db
            .run(move |conn| {
                Box::pin(async move {
                    let waiting = store::unpublished(conn, from, BATCH).await?;
                    let rows: Vec<(i64, &str)> =
                        waiting.iter().map(|saga| (saga.command_row, saga.subject.as_str())).collect();
                    let what_became: HashMap<i64, Publication> = publications(conn, &rows).await?;
                    Ok::<_, sqlx::Error>((waiting, what_became))
                })
            })
            .await?;
        *cursor = if (waiting.len() as i64) < BATCH { 0 } else { waiting.last().map_or(0, |last| last.command_row) };
        for Unpublished { saga_id, command_row, revision, .. } in waiting {
            let (event, published_at) = match what_became.get(&command_row) {
                Some(Publication::Published(at)) => (Event::Published, Some(*at)),
                Some(Publication::Parked(reason)) => (Event::Parked { reason: reason.clone() }, None),
                // Gone from the archive by retention: it was out, so the time is up.
                None => (Event::Published, None),
                Some(Publication::Pending) => continue,
            };
            let orchestrator = self.clone();
            let noted = self.committed(db, move |conn| {
                Box::pin(async move {
                    // A reply may have moved the saga on meanwhile: what became of this command says
                    // nothing of the next one, whose clock it must not start.
                    let saga = store::lock(conn, saga_id).await?.filter(|now| now.revision == revision);
                    // A saga that is stuck because its command is parked, and still is: nothing new.
                    let news = saga.is_some_and(|saga| saga.status != Status::Stuck || published_at.is_some());
                    if news {
                        let source = EventSource { published_at, ..EventSource::of("deadlines") };
                        orchestrator.take_in(conn, saga_id, &event, source).await?;
                    }
                    Ok(())
                })
            });
            // One saga that can't be moved (of a kind only a newer program knows) is no reason to
            // leave the others alone.
            if let Err(error) = noted.await {
                tracing::warn!(saga.id = %saga_id, %error, "a command's publication could not be noted; trying again");
            }
        }
        Ok(())
    }

    /// Asks the outbox for undo commands that can't be sent: their sagas say that they were taken back,
    /// and are not.
    async fn follow_undos(&self, db: &Database, cursor: &mut i64) -> Result<(), SagaError> {
        let from = *cursor;
        let (parked, undone) = db
            .run(move |conn| {
                Box::pin(async move {
                    let parked = parked_of_sagas(conn, from, BATCH).await?;
                    let saga_ids: Vec<Uuid> = parked.iter().map(|row| row.saga_id).collect();
                    let undone = if parked.is_empty() { vec![] } else { store::undone_among(conn, &saga_ids).await? };
                    Ok::<_, sqlx::Error>((parked, undone))
                })
            })
            .await?;
        *cursor = if (parked.len() as i64) < BATCH { 0 } else { parked.last().map_or(0, |last| last.row_id) };
        for row in parked {
            let Some(saga) = undone.iter().find(|saga| saga.saga_id == row.saga_id) else { continue };
            // A saga of a kind only a newer program knows is no reason to leave the others alone.
            let Ok(Some(step)) = self.undo_not_known_open(saga, row.message_id) else { continue };
            let (orchestrator, saga_id) = (self.clone(), row.saga_id);
            let noted = self.committed(db, move |conn| {
                Box::pin(async move {
                    let Some(now) = store::lock(conn, saga_id).await? else { return Ok(()) };
                    // Looked at again under the lock: it may have been replayed, and its reply be here.
                    let became = publications(conn, &[(row.row_id, &row.key)]).await?.remove(&row.row_id);
                    if let (Some(Publication::Parked(reason)), true) = (became, now.undone) {
                        let event = Event::UndoParked { step, reason };
                        orchestrator.take_in(conn, saga_id, &event, EventSource::of("deadlines")).await?;
                    }
                    Ok(())
                })
            });
            if let Err(error) = noted.await {
                tracing::warn!(saga.id = %saga_id, %error, "a parked undo could not be noted; trying again");
            }
        }
        Ok(())
    }

    /// The step whose undo command this message is, unless the saga says already that it is not undone.
    fn undo_not_known_open(&self, saga: &Saga, message: Uuid) -> Result<Option<usize>, SagaError> {
        let steps = self.definition(saga)?.steps;
        let step = steps.iter().position(|step| message_id(saga.saga_id, step.name, "undo") == message);
        Ok(step.filter(|&step| saga.refused_undos.iter().all(|name| name != steps[step].name)))
    }

    async fn look_into(&self, db: &Database, saga_id: Uuid) -> Result<(), SagaError> {
        let recourse = self.inner.flows.recourse();
        let orchestrator = self.clone();
        let asked = self
            .committed(db, move |conn| {
                Box::pin(async move {
                    let Some(saga) = store::lock(conn, saga_id).await? else { return Ok(None) };
                    // Looked at again under the lock: a reply may have come, or another replica may ask.
                    if !store::overdue_now(conn, saga_id).await? {
                        return Ok(None);
                    }
                    if saga.status == Status::Resolving && recourse != Recourse::Ask {
                        // Whoever asked has died, and nobody is left to ask. Replies that waited for the
                        // outcome come first; if there are none, the next sweep decides.
                        let gone = Event::Settled(Settlement::NoAnswer("whoever asked has vanished".to_owned()));
                        orchestrator.take_in(conn, saga_id, &gone, EventSource::of("deadlines")).await?;
                        orchestrator.take_up_deferred(conn, saga_id).await?;
                        return Ok(None);
                    }
                    let event = Event::Overdue { recourse };
                    let handled = orchestrator.take_in(conn, saga_id, &event, EventSource::of("deadlines")).await?;
                    let asking = handled == Some(Handled::Moved(Status::Resolving));
                    Ok(if asking { store::find(conn, saga_id).await? } else { None })
                })
            })
            .await?;
        let Some(saga) = asked else { return Ok(()) };
        debug_assert_eq!(recourse, Recourse::Ask);
        fault_points::reached("sagas::resolving");

        let settings = &self.inner.settings;
        let asking = {
            let (orchestrator, saga, patience) = (self.clone(), saga.clone(), settings.ask_timeout);
            // A task of its own: a panic is an answer that counts, not a question asked for ever.
            tokio::spawn(async move { tokio::time::timeout(patience, orchestrator.inner.flows.ask(&saga)).await })
        };
        let answer = match asking.await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Settlement::NoAnswer(format!("no answer within {:?}", settings.ask_timeout)),
            Err(failure) => Settlement::NoAnswer(format!("the question failed: {failure}")),
        };
        let answer = match answer {
            Settlement::NoAnswer(why) if saga.resolve_attempts + 1 >= settings.resolve_attempts as i32 => {
                Settlement::GaveUp(format!("{} questions, the last one: {why}", saga.resolve_attempts + 1))
            }
            answer => answer,
        };
        fault_points::reached("sagas::asked");
        let (orchestrator, revision) = (self.clone(), saga.revision);
        self.committed(db, move |conn| {
            Box::pin(async move {
                // Something has happened since: somebody else took this asker for dead and asks anew. An
                // outcome that late must not settle their question.
                let still_ours = store::lock(conn, saga_id).await?.is_some_and(|now| now.revision == revision);
                if still_ours {
                    orchestrator.take_in(conn, saga_id, &Event::Settled(answer), EventSource::of("back-check")).await?;
                    orchestrator.take_up_deferred(conn, saga_id).await?;
                }
                Ok(())
            })
        })
        .await
    }
}
