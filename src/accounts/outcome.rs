use std::time::Duration;

use saga_orchestrator::store;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::{
    app::App,
    db::{self, Fate},
};

/// How long the outcome of a COMMIT is looked for.
const LOOK_FOR: Duration = Duration::from_secs(5);
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// What became of a registration whose COMMIT was not answered: written, or surely not. `None` when
/// that can't be learnt in reasonable time.
pub(super) async fn outcome(app: &App, saga_id: Uuid, transaction: &str) -> Option<bool> {
    let until = Instant::now() + LOOK_FOR;
    loop {
        let transaction = transaction.to_owned();
        let look = app.db.run(move |conn| {
            Box::pin(async move {
                // In this order: a backend that is still committing between the two reads leaves the
                // first answer unsettled, and the question is asked again.
                let fate = db::fate_of(conn, &transaction).await?;
                let saga = store::find(conn, saga_id).await?;
                Ok::<_, sqlx::Error>((saga.is_some(), fate))
            })
        });
        let left = until.saturating_duration_since(Instant::now());
        match timeout(left, look).await {
            Ok(Ok((true, _))) => return Some(true),
            Ok(Ok((false, Fate::Aborted))) => return Some(false),
            // Committed, and yet not there: another server answers, which was behind the first one.
            Ok(Ok((false, Fate::Committed))) | Err(_) => return None,
            Ok(Ok((false, Fate::Unsettled)) | Err(_)) => sleep(LOOK_PAUSE).await,
        }
    }
}
