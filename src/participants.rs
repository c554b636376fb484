//! This service's side of its sagas: what completing and compensating mean here, and whom to ask
//! about silence.

use saga_orchestrator::{Flows, LocalOutcome, Recourse, Saga, Settlement};
use serde::Deserialize;
use sqlx::PgConnection;

use crate::{
    accounts,
    config::SilencePolicy,
    domain::UserId,
    user_client::{Answer, UserServiceClient},
};

/// See the module's words.
#[derive(Debug)]
pub struct Participants {
    client: Option<UserServiceClient>,
    silence: SilencePolicy,
}

/// The data of a create saga: see `saga_orchestrator::flows::create_user::data`.
#[derive(Debug, Deserialize)]
struct CreateUser {
    id: i32,
    username: String,
    email: String,
}

impl Participants {
    /// `client` asks the user-service; without one `silence` decides.
    pub fn new(client: Option<UserServiceClient>, silence: SilencePolicy) -> Self {
        Self { client, silence }
    }
}

fn create_user(saga: &Saga) -> Result<CreateUser, sqlx::Error> {
    serde_json::from_value(saga.data.clone()).map_err(|error| sqlx::Error::Decode(error.into()))
}

impl Flows for Participants {
    async fn complete(&self, conn: &mut PgConnection, saga: &Saga) -> Result<LocalOutcome, sqlx::Error> {
        let user = create_user(saga)?;
        Ok(match accounts::activate(conn, UserId(user.id), saga.saga_id).await? {
            true => LocalOutcome::Applied,
            false => LocalOutcome::Impossible(format!(
                "the profile exists, but user {} is not pending in this saga any more (removed by hand?); \
                 compensate to erase the profile",
                user.id
            )),
        })
    }

    async fn compensate(&self, conn: &mut PgConnection, saga: &Saga) -> Result<LocalOutcome, sqlx::Error> {
        let user = create_user(saga)?;
        Ok(match accounts::take_back(conn, UserId(user.id), saga.saga_id).await? {
            true => LocalOutcome::Applied,
            false => LocalOutcome::Impossible(format!(
                "user {} is not pending in this saga, so it was not taken back; look at the user before deciding",
                user.id
            )),
        })
    }

    fn recourse(&self) -> Recourse {
        match (&self.client, self.silence) {
            (Some(_), _) => Recourse::Ask,
            (None, SilencePolicy::AssumeCompleted) => Recourse::AssumeCompleted,
            (None, SilencePolicy::Stuck) => Recourse::NeedsOperator,
        }
    }

    async fn ask(&self, saga: &Saga) -> Settlement {
        let Some(client) = &self.client else {
            return Settlement::NoAnswer("USER_SERVICE_GRPC_URL is not set".to_owned());
        };
        let user = match create_user(saga) {
            Ok(user) => user,
            Err(error) => return Settlement::Ambiguous(format!("the saga's data can't be read: {error}")),
        };
        match client.settle(i64::from(user.id), &user.username, &user.email, saga.saga_id).await {
            Answer::Present => Settlement::AlreadyDone,
            Answer::Created => Settlement::DoneNow,
            Answer::Refused(why) => Settlement::Refused(why),
            Answer::Ambiguous(why) => Settlement::Ambiguous(why),
            Answer::NoAnswer(why) => Settlement::NoAnswer(why),
        }
    }
}
