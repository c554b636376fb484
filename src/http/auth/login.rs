use axum::{extract::State, http::StatusCode};
use secrecy::SecretString;
use serde_json::Value;

use super::{Success, shown};
use crate::{
    accounts::{self, RequestContext},
    app::App,
    domain::{FieldError, Identifier},
    http::{cookies, error::ApiError, extract::Fields},
    sessions::Carried,
};

/// `POST /auth/login`
pub async fn login(
    State(app): State<App>,
    context: RequestContext,
    held: Carried,
    mut fields: Fields,
) -> Result<Success<Value>, ApiError> {
    let (name, password) = match (name(&mut fields), required(&mut fields, "password")) {
        (Ok(name), Ok(password)) => (name, SecretString::from(password)),
        (name, password) => {
            return Err(ApiError::Validation([name.err(), password.err()].into_iter().flatten().collect()));
        }
    };
    let logged_in = accounts::login(&app, Identifier::parse(&name), password, &held, &context).await?;
    Ok(Success {
        status: StatusCode::OK,
        message: "Logged in successfully",
        data: shown(&logged_in.user),
        cookies: cookies::both(&app.config, &logged_in.tokens).into(),
    })
}

/// By whichever of the three names it comes.
fn name(fields: &mut Fields) -> Result<String, FieldError> {
    for field in ["identifier", "email", "username"] {
        if let Some(name) = fields.text_if_any(field)?.filter(|name| !name.trim().is_empty()) {
            return Ok(name);
        }
    }
    Err(FieldError::new("identifier", "is required: an e-mail address or a username"))
}

fn required(fields: &mut Fields, field: &'static str) -> Result<String, FieldError> {
    match fields.text(field)? {
        text if text.is_empty() => Err(FieldError::new(field, "is required")),
        text => Ok(text),
    }
}
