use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
};
use chrono::Utc;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::{Success, shown};
use crate::{
    accounts::{self, RequestContext},
    app::App,
    domain::{FieldError, Identifier},
    http::{cookies, error::ApiError, extract::Fields},
};

/// `POST /auth/login`
pub async fn login(
    State(app): State<App>,
    context: RequestContext,
    headers: HeaderMap,
    mut fields: Fields,
) -> Result<Success<Value>, ApiError> {
    let (name, password) = match (name(&mut fields), required(&mut fields, "password")) {
        (Ok(name), Ok(password)) => (name, SecretString::from(password)),
        (name, password) => {
            return Err(ApiError::Validation([name.err(), password.err()].into_iter().flatten().collect()));
        }
    };
    // A refresh cookie that can't be read is no reason to keep anybody out.
    let held = cookies::read(&headers, app.config.http.cookies).unwrap_or_default().refresh;
    let held = held.as_ref().map(|token| token.expose_secret());
    let logged_in = accounts::login(&app, Identifier::parse(&name), password, held, &context).await?;
    Ok(Success {
        status: StatusCode::OK,
        message: "Logged in successfully",
        data: shown(&logged_in.user),
        cookies: cookies::both(&app.config, &logged_in.tokens, Utc::now()).into(),
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
