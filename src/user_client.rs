//! Asks the user-service what became of a registration whose answer did not come by Kafka, and has
//! the profile made where there is none.
//!
//! Silence is never taken for an answer here: whatever is not a definite yes or no is
//! [`Answer::NoAnswer`] (ask again later) or [`Answer::Ambiguous`] (asking again would not help).

use std::time::Duration;

use auth_proto::{
    legacy::auth::{CreateUserRequest as LegacyRequest, auth_user_client::AuthUserClient},
    user::v1::{CreateUserRequest, GetUserRequest, User, user_service_client},
};
use tonic::{
    Code, Request, Status,
    transport::{Channel, ClientTlsConfig, Endpoint, Error},
};
use uuid::Uuid;

const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// For one call. A question is three calls at most, of which the third follows an immediate
/// `UNIMPLEMENTED`; together they stay below the orchestrator's patience of ten seconds.
const CALL_DEADLINE: Duration = Duration::from_secs(4);
const KEEPALIVE: Duration = Duration::from_secs(30);
const LARGEST_ANSWER: usize = 64 * 1024;
/// Of the other side's words, this many characters are kept.
const REASON_LENGTH: usize = 300;

const CAN_NOT_TELL: &str = "the user-service speaks only the original auth.AuthUser and answered ALREADY_EXISTS, which can't \
     tell this registration's own earlier create from somebody else's profile; look at the user-service's data, \
     then complete or compensate";

/// What the user-service says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The profile was there already.
    Present,
    /// The profile has just been made.
    Created,
    /// Definitely refused, for this reason.
    Refused(String),
    /// It can't be told whose profile it is; a person has to look.
    Ambiguous(String),
    /// Nothing was learnt; ask again.
    NoAnswer(String),
}

/// A user as the saga knows it.
#[derive(Debug, Clone, Copy)]
struct Asked<'a> {
    user_id: i64,
    username: &'a str,
    email: &'a str,
    saga_id: Uuid,
}

/// The client. Connects when first used, and again after every loss.
#[derive(Debug, Clone)]
pub struct UserServiceClient {
    current: user_service_client::UserServiceClient<Channel>,
    legacy: AuthUserClient<Channel>,
}

impl UserServiceClient {
    /// `url` is `http://host:port`, or `https://…` with a certificate this machine trusts.
    pub fn new(url: &str) -> Result<Self, Error> {
        let mut endpoint = Endpoint::from_shared(url.to_owned())?
            .connect_timeout(CONNECT_DEADLINE)
            .timeout(CALL_DEADLINE)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(CALL_DEADLINE);
        if endpoint.uri().scheme_str() == Some("https") {
            endpoint = endpoint.tls_config(ClientTlsConfig::new().with_enabled_roots())?;
        }
        let channel = endpoint.connect_lazy();
        Ok(Self {
            current: user_service_client::UserServiceClient::new(channel.clone())
                .max_decoding_message_size(LARGEST_ANSWER),
            legacy: AuthUserClient::new(channel).max_decoding_message_size(LARGEST_ANSWER),
        })
    }

    /// Looks for the profile, and has it made where there is none.
    pub async fn settle(&self, user_id: i64, username: &str, email: &str, saga_id: Uuid) -> Answer {
        let asked = Asked { user_id, username, email, saga_id };
        let mut client = self.current.clone();
        match client.get_user(deadlined(GetUserRequest { user_id })).await {
            Ok(found) => asked.compared_with(&found.into_inner(), Answer::Present),
            Err(status) => match status.code() {
                Code::NotFound => self.create(asked).await,
                Code::Unimplemented => self.create_by_legacy(asked).await,
                _ => Answer::NoAnswer(said("GetUser", &status)),
            },
        }
    }

    async fn create(&self, asked: Asked<'_>) -> Answer {
        let request = CreateUserRequest {
            user_id: asked.user_id,
            username: asked.username.to_owned(),
            email: asked.email.to_owned(),
            saga_id: asked.saga_id.to_string(),
        };
        match self.current.clone().create_user(deadlined(request)).await {
            Ok(created) => match created.into_inner().user {
                Some(user) => asked.compared_with(&user, Answer::Created),
                None => Answer::Created,
            },
            Err(status) => match status.code() {
                Code::InvalidArgument | Code::FailedPrecondition | Code::AlreadyExists => {
                    Answer::Refused(said("CreateUser", &status))
                }
                Code::Unimplemented => self.create_by_legacy(asked).await,
                _ => Answer::NoAnswer(said("CreateUser", &status)),
            },
        }
    }

    async fn create_by_legacy(&self, asked: Asked<'_>) -> Answer {
        let Ok(id) = i32::try_from(asked.user_id) else {
            return Answer::Ambiguous("the user's id is too large for the original auth.AuthUser".to_owned());
        };
        let request = LegacyRequest { id, username: asked.username.to_owned(), email: asked.email.to_owned() };
        match self.legacy.clone().create_user(deadlined(request)).await {
            Ok(response) => by_legacy_code(response.into_inner().code),
            Err(status) => match status.code() {
                Code::AlreadyExists => Answer::Ambiguous(CAN_NOT_TELL.to_owned()),
                Code::InvalidArgument | Code::FailedPrecondition => {
                    Answer::Refused(said("auth.AuthUser/CreateUser", &status))
                }
                Code::Unimplemented => Answer::NoAnswer(
                    "USER_SERVICE_GRPC_URL answers neither user.v1.UserService nor auth.AuthUser; is it the right address?"
                        .to_owned(),
                ),
                _ => Answer::NoAnswer(said("auth.AuthUser/CreateUser", &status)),
            },
        }
    }
}

impl Asked<'_> {
    /// `then`, if the profile is this registration's. The saga id decides where there is one: a
    /// profile may have been renamed since.
    fn compared_with(&self, found: &User, then: Answer) -> Answer {
        let ours = if found.saga_id.is_empty() {
            let same = |ours: &str, theirs: &str| theirs.is_empty() || ours.to_lowercase() == theirs.to_lowercase();
            same(self.username, &found.username) && same(self.email, &found.email)
        } else {
            found.saga_id.parse() == Ok(self.saga_id)
        };
        if ours && (found.user_id == self.user_id || found.user_id == 0) {
            return then;
        }
        let whose = match found.saga_id.as_str() {
            "" => "with another name or address".to_owned(),
            saga => format!("of saga {}", plain(saga)),
        };
        Answer::Ambiguous(format!(
            "the user-service has a profile for user {} {whose}; find out whose it is, then complete or compensate",
            self.user_id
        ))
    }
}

/// The original's answer is a number in an OK response; nobody wrote down of which kind. Those that
/// can only mean one thing are believed.
fn by_legacy_code(code: i32) -> Answer {
    match code {
        0 | 200..=299 => Answer::Created,
        // gRPC's and HTTP's "invalid"
        3 | 9 | 400 | 422 => Answer::Refused(format!("auth.AuthUser/CreateUser answered code {code}")),
        // gRPC's and HTTP's "exists"
        6 | 409 => Answer::Ambiguous(CAN_NOT_TELL.to_owned()),
        _ => Answer::NoAnswer(format!("auth.AuthUser/CreateUser answered code {code}")),
    }
}

/// The deadline travels along, so that the other side can give up too.
fn deadlined<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_DEADLINE);
    request
}

fn said(call: &str, status: &Status) -> String {
    match plain(status.message()) {
        words if words.is_empty() => format!("{call}: {:?}", status.code()),
        words => format!("{call}: {:?}: {words}", status.code()),
    }
}

/// Fit for a log line and a text column, which can't hold a NUL.
fn plain(words: &str) -> String {
    words.chars().filter(|c| !c.is_control()).take(REASON_LENGTH).collect()
}

#[cfg(test)]
mod tests;
