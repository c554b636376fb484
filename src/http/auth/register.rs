use axum::{extract::State, http::StatusCode};
use secrecy::SecretString;
use serde_json::{Value, json};

use super::{Success, shown};
use crate::{
    accounts::{self, NewAccount, RequestContext},
    app::App,
    http::{cookies, error::ApiError, extract::Fields},
};

/// `POST /auth/register`
pub async fn register(
    State(app): State<App>,
    context: RequestContext,
    mut fields: Fields,
) -> Result<Success<Value>, ApiError> {
    let account = match (fields.text("username"), fields.text("email"), fields.text("password")) {
        (Ok(username), Ok(email), Ok(password)) => {
            NewAccount { username, email, password: SecretString::from(password) }
        }
        (username, email, password) => {
            let errors = [username.err(), email.err(), password.err()].into_iter().flatten().collect();
            return Err(ApiError::Validation(errors));
        }
    };
    let registered = accounts::register(&app, account, &context).await?;
    let mut data = shown(&registered.user);
    data["sagaId"] = json!(registered.saga_id);
    Ok(Success {
        status: StatusCode::CREATED,
        message: "User registered successfully",
        data,
        cookies: cookies::both(&app.config, &registered.tokens).into(),
    })
}
