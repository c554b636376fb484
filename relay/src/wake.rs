//! Waking the relay up, in three tiers: a signal inside this process after a commit; one NOTIFY
//! for other processes, sent after the commit on a connection of its own and at most every 20 ms;
//! and the relay's own poll, which is the guarantee. A hint that is lost costs a poll interval.
//!
//! There is no trigger and no NOTIFY inside the business transaction: PostgreSQL takes one lock for
//! the whole database at the commit of a notifying transaction.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::database::Database;

const CHANNEL: &str = "outbox_wake";
const COALESCE: Duration = Duration::from_millis(20);
const RETRY: Duration = Duration::from_secs(1);

/// Tells relays that there is something to send. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Wake {
    /// Commits of this process, to be told to others.
    own: watch::Sender<()>,
    /// Commits of any process.
    any: watch::Sender<()>,
}

impl Default for Wake {
    fn default() -> Self {
        Self { own: watch::Sender::new(()), any: watch::Sender::new(()) }
    }
}

impl Wake {
    /// To be called after a transaction that appended has committed.
    pub fn notify(&self) {
        self.own.send_replace(());
        self.any.send_replace(());
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.any.subscribe()
    }

    /// Tells other processes of this one's commits, until `shutdown`. Run it wherever something is
    /// appended; it holds a pooled connection only for the moment of the NOTIFY.
    pub async fn announce(self, db: Database, shutdown: CancellationToken) {
        let mut own = self.own.subscribe();
        let announcing = async {
            while own.changed().await.is_ok() {
                let told = db.run(|conn| Box::pin(sqlx::query("select pg_notify($1, '')").bind(CHANNEL).execute(conn)));
                if let Err(error) = told.await {
                    tracing::debug!(%error, "other relays were not woken; their poll finds the rows");
                }
                tokio::time::sleep(COALESCE).await;
            }
        };
        shutdown.run_until_cancelled(announcing).await;
    }

    /// Listens to other processes, until `shutdown`. Holds one connection for good.
    pub(crate) async fn listen(self, db: Database, shutdown: CancellationToken) {
        let listening = async {
            loop {
                if let Err(error) = self.listen_once(&db).await {
                    tracing::debug!(%error, "listening for wake-ups failed; polling meanwhile");
                }
                tokio::time::sleep(RETRY).await;
            }
        };
        shutdown.run_until_cancelled(listening).await;
    }

    async fn listen_once(&self, db: &Database) -> Result<(), sqlx::Error> {
        let mut listener = db.listener().await?;
        listener.listen(CHANNEL).await?;
        loop {
            // `None` tells of a lost connection: what was said meanwhile was missed, so wake too.
            listener.try_recv().await?;
            self.any.send_replace(());
        }
    }
}
