//! The relay as a whole: one lease keeper and a few workers, each with its own producer and its own
//! share of the lanes. While one worker waits for the database the other waits for the broker.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    sync::{Mutex, RwLock},
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    database::Database,
    lanes::{FENCES, LeaseKeeper, Ownership},
    message::LANES,
    publisher::{KafkaSettings, Publisher, PublisherError},
    supervisor::Supervisor,
    wake::Wake,
    worker::Worker,
};

/// How a relay runs.
#[derive(Debug, Clone)]
pub struct RelaySettings {
    /// Shown to operators as the owner of lanes: host and process, say.
    pub name: String,
    /// The broker.
    pub kafka: KafkaSettings,
    /// How long lanes stay owned without a renewal. A dead relay's lanes are taken over within
    /// twice this.
    pub lease: Duration,
    /// Most rows a worker holds in memory.
    pub batch: usize,
    /// Workers; each has a producer. Two overlap database and broker.
    pub workers: usize,
    /// Longest time between two looks at the outbox, when no wake-up comes.
    pub poll: Duration,
    /// Whether relays fence each other off at the broker, by a Kafka transaction a batch: one that was
    /// frozen past its lease then appends nothing any more, not even a copy. Messages show a commit later,
    /// only consumers that read committed ones profit, and up to eight relays share the lanes. The same
    /// for all relays of an outbox.
    pub fencing: bool,
}

impl RelaySettings {
    /// A producer; with the name of a fence, one that can raise it.
    pub(crate) fn publisher(&self, fence: Option<&str>) -> Result<Publisher, PublisherError> {
        Publisher::new(&self.kafka, self.batch, self.delivery_timeout(), fence)
    }

    /// How long the client tries to deliver one message, or to finish a transaction, before it reports a failure.
    ///
    /// A cluster replaces a killed leader after its session of 9 s and an election. A client that gives up
    /// earlier leaves a message that the old leader may have appended, and sends it again: a duplicate for
    /// every message in flight. Within this time the client itself tries again, under the same sequence
    /// number, and the broker drops the duplicate. Order does not depend on it: the next message of a key
    /// waits for the report, whatever it says.
    ///
    /// With fencing it is also the life of a transaction at the broker, and so a part of how long consumers of
    /// committed messages wait when no relay is left to abort one. It is shorter there for that reason.
    pub(crate) fn delivery_timeout(&self) -> Duration {
        let seconds = if self.fencing { 20 } else { 30 };
        (self.lease * 2).max(Duration::from_secs(seconds))
    }
}

/// A relay: delivers what stands in the outbox until it is told to stop.
pub struct Relay {
    settings: Arc<RelaySettings>,
    db: Database,
    wake: Wake,
    ownership: Ownership,
    /// See [`Worker`].
    trials: Arc<RwLock<()>>,
    supervisor: Supervisor,
}

impl Relay {
    /// `db` is the relay's own, with the settings of [`session::RELAY`](crate::session::RELAY): a storm of logins must not starve it, nor
    /// it them. It lends one connection per worker and one for the lease at the most; listening takes another
    /// one beside it.
    pub fn new(db: Database, mut settings: RelaySettings, wake: Wake) -> Self {
        if settings.fencing {
            settings.workers = FENCES;
        }
        Self {
            settings: Arc::new(settings),
            db,
            wake,
            ownership: Ownership::default(),
            trials: Arc::default(),
            supervisor: Supervisor::default(),
        }
    }

    /// Has `supervisor` run the relay's tasks, so that its owner sees how they do.
    pub fn supervised_by(self, supervisor: Supervisor) -> Self {
        Self { supervisor, ..self }
    }

    /// Runs until `shutdown`, then waits for what is in flight (at most one lease), archives it and
    /// gives its lanes back, so that another relay goes on at once.
    ///
    /// Fails at once where the producer's settings are refused; nothing later makes it return. Dropped
    /// before it returns, it stops on the spot, as if the process had died.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), PublisherError> {
        self.settings.publisher(None)?;
        let keeper_stop = CancellationToken::new();
        // Shared by all lives of the task: one that panicked has not lost the lease.
        let keeper = Arc::new(Mutex::new(LeaseKeeper::new(
            self.ownership.clone(),
            self.settings.name.clone(),
            self.settings.lease,
            self.settings.batch,
            if self.settings.fencing { FENCES as i16 } else { LANES },
        )));
        let relay = Arc::new(self);
        let keeping = {
            let (relay, keeper, stop) = (relay.clone(), keeper.clone(), keeper_stop.clone());
            let start = {
                let (relay, stop) = (relay.clone(), stop.clone());
                move || keep_lease(keeper.clone(), relay.clone(), stop.clone())
            };
            spawn(async move { relay.supervisor.run("relay-lease-keeper", stop, start).await })
        };
        let listening = {
            let (relay, stop) = (relay.clone(), shutdown.clone());
            let start = {
                let (relay, stop) = (relay.clone(), stop.clone());
                move || {
                    let listening = relay.wake.clone().listen(relay.db.clone(), stop.clone());
                    async {
                        listening.await;
                        Ok::<_, Infallible>(())
                    }
                }
            };
            spawn(async move { relay.supervisor.run("relay-wake-listener", stop, start).await })
        };
        let workers: Vec<_> = (0..relay.settings.workers)
            .map(|index| {
                let (relay, stop) = (relay.clone(), shutdown.clone());
                let start = {
                    let (relay, stop) = (relay.clone(), stop.clone());
                    move || work(relay.clone(), index, stop.clone())
                };
                spawn(async move { relay.supervisor.run(format!("relay-worker-{index}"), stop, start).await })
            })
            .collect();
        for worker in workers {
            let _ = worker.await;
        }
        keeper_stop.cancel();
        let _ = tokio::join!(keeping, listening);
        resign(&keeper, &relay).await;
        Ok(())
    }
}

fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> AbortOnDropHandle<T> {
    AbortOnDropHandle::new(tokio::spawn(task))
}

/// One life of a worker. Where it ends in a panic, its lanes come under suspicion as if the process had died: the
/// row that did it may be among them.
async fn work(relay: Arc<Relay>, index: usize, shutdown: CancellationToken) -> Result<(), String> {
    let publisher = relay.settings.publisher(None).map_err(|error| format!("no producer: {error}"))?;
    let worker = Worker::new(
        index,
        relay.settings.clone(),
        relay.db.clone(),
        relay.ownership.clone(),
        publisher,
        relay.wake.subscribe(),
        relay.trials.clone(),
    );
    let Err(failure) = spawn(worker.run(shutdown.clone())).await else { return Ok(()) };
    metrics::counter!("outbox_worker_deaths_total").increment(1);
    let (workers, batch) = (relay.settings.workers, relay.settings.batch);
    let accused =
        relay.db.lend(relay.settings.lease, async |conn| relay.ownership.accuse(conn, index, workers, batch).await);
    if let Err(error) = accused.await {
        tracing::warn!(%error, "the suspicion could not be written down");
    }
    Err(format!("{failure}; its lanes are under suspicion"))
}

async fn keep_lease(
    keeper: Arc<Mutex<LeaseKeeper>>,
    relay: Arc<Relay>,
    stop: CancellationToken,
) -> Result<(), Infallible> {
    let every = relay.settings.lease / 4;
    while !stop.is_cancelled() {
        let mut keeper = keeper.lock().await;
        // A connection that has fallen silent is closed in time: the next round asks on another, while there is
        // still some trust left.
        let renewed = relay.db.lend(every, async |conn| keeper.tick(conn).await).await;
        drop(keeper);
        if let Err(error) = renewed {
            tracing::warn!(%error, "lease not renewed; trying again");
        }
        metrics::gauge!("outbox_lanes_owned").set(relay.ownership.count() as f64);
        stop.run_until_cancelled(sleep(every.mul_f64(0.9 + jitter() * 0.2))).await;
    }
    Ok(())
}

async fn resign(keeper: &Mutex<LeaseKeeper>, relay: &Relay) {
    let mut keeper = keeper.lock().await;
    let resigned = relay.db.lend(relay.settings.lease, async |conn| keeper.resign(conn).await);
    if let Err(error) = resigned.await {
        tracing::warn!(%error, "lanes not given back; others take them when the lease runs out");
    }
}

/// A number in 0..1 that differs between processes and moments; good enough to spread polls.
pub(crate) fn jitter() -> f64 {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
    f64::from(nanos % 1000) / 1000.0
}
