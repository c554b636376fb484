//! `auth.v1.AccountService`. Who may call it is decided before: see [`super::callers`].

use auth_proto::auth::v1::{
    Account, AccountStatus, GetAccountRequest, MarkVerifiedRequest,
    account_service_server::{AccountService, SERVICE_NAME},
};
use chrono::{DateTime, Utc};
use prost_types::Timestamp;
use tonic::{Request, Response, Status};

use super::{callers::Caller, status::Refusal};
use crate::{
    accounts,
    app::App,
    domain::{User, UserId, UserStatus},
};

/// The service's full name.
pub const NAME: &str = SERVICE_NAME;

/// Answers its calls.
pub struct Accounts {
    app: App,
}

impl Accounts {
    /// On `app`'s accounts.
    pub fn new(app: App) -> Self {
        Self { app }
    }
}

#[tonic::async_trait]
impl AccountService for Accounts {
    async fn get_account(&self, request: Request<GetAccountRequest>) -> Result<Response<Account>, Status> {
        let id = user_id(request.get_ref().user_id)?;
        let user = accounts::get_account(&self.app, id).await.map_err(Refusal::Database)?;
        Ok(Response::new(account(user.ok_or(Refusal::UnknownUser)?)))
    }

    async fn mark_verified(&self, request: Request<MarkVerifiedRequest>) -> Result<Response<Account>, Status> {
        let id = user_id(request.get_ref().user_id)?;
        let caller = request.extensions().get::<Caller>().map_or("nobody", Caller::name);
        let user = accounts::mark_verified(&self.app, id, caller).await.map_err(Refusal::Database)?;
        Ok(Response::new(account(user.ok_or(Refusal::UnknownUser)?)))
    }
}

/// A point in time, as the contracts have it.
pub fn timestamp(at: DateTime<Utc>) -> Timestamp {
    Timestamp { seconds: at.timestamp(), nanos: at.timestamp_subsec_nanos().min(999_999_999) as i32 }
}

/// Ids are 32 bits here and 64 in the contract: one beyond names nobody.
fn user_id(given: i64) -> Result<UserId, Refusal> {
    match given {
        ..=0 => Err(Refusal::ImpossibleUserId),
        given => i32::try_from(given).map(UserId).map_err(|_| Refusal::UnknownUser),
    }
}

fn account(user: User) -> Account {
    let status = match user.status {
        UserStatus::Pending => AccountStatus::Pending,
        UserStatus::Active => AccountStatus::Active,
        UserStatus::Closing => AccountStatus::Closing,
    };
    Account {
        user_id: user.id.0.into(),
        username: user.username,
        email: user.email,
        is_verified: user.is_verified,
        status: status.into(),
        created_at: Some(timestamp(user.created_at)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_nobody_can_have_is_told_from_one_nobody_has() {
        assert!(matches!(user_id(1), Ok(UserId(1))));
        assert!(matches!(user_id(i64::from(i32::MAX)), Ok(UserId(i32::MAX))));
        for impossible in [0, -1, i64::MIN] {
            assert!(matches!(user_id(impossible), Err(Refusal::ImpossibleUserId)), "{impossible}");
        }
        for unknown in [i64::from(i32::MAX) + 1, i64::MAX] {
            assert!(matches!(user_id(unknown), Err(Refusal::UnknownUser)), "{unknown}");
        }
    }

    #[test]
    fn a_leap_second_is_still_a_timestamp() {
        let leap = DateTime::from_timestamp(1_483_228_799, 1_500_000_000).expect("a leap second");
        assert_eq!(timestamp(leap), Timestamp { seconds: 1_483_228_799, nanos: 999_999_999 });
    }
}
