//! What handlers take: the fields of a JSON body, the request's context, its tokens.

use std::{collections::BTreeMap, fmt};

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Request},
    http::{HeaderMap, header, request::Parts},
};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;

use super::{context::Ids, cookies, error::ApiError};
use crate::{
    accounts::RequestContext,
    app::App,
    domain::FieldError,
    sessions::{Arrived, Carried},
};

const MAX_IDEMPOTENCY_KEY: usize = 255;
const MAX_USER_AGENT: usize = 256;

/// The fields of a JSON object. Those nobody asks for are ignored: clients of the original fleet
/// send a few more.
#[derive(Default, PartialEq)]
pub struct Fields(BTreeMap<String, Value>);

impl Fields {
    /// A field that has to be there, as text.
    pub fn text(&mut self, name: &'static str) -> Result<String, FieldError> {
        self.text_if_any(name)?.ok_or_else(|| FieldError::new(name, "is required"))
    }

    /// A field that may be there, as text. Null is the same as nothing.
    pub fn text_if_any(&mut self, name: &'static str) -> Result<Option<String>, FieldError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(FieldError::new(name, "must be a string")),
        }
    }

    fn parse(headers: &HeaderMap, body: &[u8]) -> Result<Self, ApiError> {
        if body.is_empty() {
            return Ok(Self::default());
        }
        if !is_json(headers) {
            return Err(ApiError::UnsupportedMediaType);
        }
        serde_json::from_slice(body).map_err(|error| {
            let message = match error.classify() {
                // Its text may quote the body, passwords and all.
                serde_json::error::Category::Syntax => {
                    format!("is not valid JSON at line {}, column {}", error.line(), error.column())
                }
                serde_json::error::Category::Eof => "is not valid JSON: it ends too early".to_owned(),
                _ => "must be a JSON object in which no field comes twice".to_owned(),
            };
            ApiError::Validation(vec![FieldError::new("body", message)])
        })
    }
}

/// The names alone: one of the values is likely to be a password.
impl fmt::Debug for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    // Two readers of one body may each take another one of the two.
                    if fields.insert(name, value).is_some() {
                        return Err(A::Error::custom("a field comes twice"));
                    }
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(Object)
    }
}

impl FromRequest<App> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let headers = request.headers().clone();
        let body = Bytes::from_request(request, app)
            .await
            .map_err(|_| ApiError::Validation(vec![FieldError::new("body", "could not be read")]))?;
        Fields::parse(&headers, &body)
    }
}

impl FromRequestParts<App> for RequestContext {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        let ids = parts.extensions.get::<Ids>().cloned().ok_or(ApiError::Internal)?;
        Ok(Self {
            correlation_id: ids.correlation_id,
            correlation_given: ids.correlation_given,
            traceparent: parts.headers.get("traceparent").and_then(|value| traceparent(value.to_str().ok()?)),
            user_agent: parts.headers.get(header::USER_AGENT).map(|value| shortened(value.as_bytes())),
            idempotency_key: idempotency_key(&parts.headers)?,
        })
    }
}

impl FromRequestParts<App> for Carried {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let arrived = parts.extensions.get::<Arrived>().copied().ok_or(ApiError::Internal)?;
        Ok(cookies::read(&parts.headers, app.config.http.cookies, arrived))
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return false;
    };
    // What a parameter holds is nothing to us, even if it is no text.
    let essence = value.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
    let essence = String::from_utf8_lossy(essence).trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

/// As W3C has it, version 00; anything else would only travel on as noise.
fn traceparent(value: &str) -> Option<String> {
    let parts: Vec<&str> = value.split('-').collect();
    let hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let fine = matches!(parts[..], ["00", trace, span, flags]
        if (trace.len(), span.len(), flags.len()) == (32, 16, 2)
            && [trace, span, flags].into_iter().all(hex)
            && [trace, span].into_iter().all(|part| part.bytes().any(|byte| byte != b'0')));
    fine.then(|| value.to_owned())
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut values = headers.get_all("idempotency-key").iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None)
            if (1..=MAX_IDEMPOTENCY_KEY).contains(&value.len())
                && value.as_bytes().iter().all(|byte| (b' '..=b'~').contains(byte)) =>
        {
            Ok(value.to_str().ok().map(str::to_owned))
        }
        _ => Err(ApiError::Validation(vec![FieldError::new(
            "Idempotency-Key",
            format!("must be one header of 1 to {MAX_IDEMPOTENCY_KEY} ASCII characters"),
        )])),
    }
}

fn shortened(user_agent: &[u8]) -> String {
    String::from_utf8_lossy(user_agent).chars().filter(|c| !c.is_control()).take(MAX_USER_AGENT).collect()
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn headers(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name.parse().expect("a name"), HeaderValue::from_static(value))])
    }

    fn refusal(body: &str) -> String {
        Fields::parse(&headers("content-type", "application/json"), body.as_bytes()).expect_err("refused").message()
    }

    #[test]
    fn a_field_is_there_or_said_to_be_missing() {
        let mut fields = Fields::parse(
            &headers("content-type", "application/json; charset=utf-8"),
            br#"{"email":"a@b.cd","age":5,"nick":null,"confirmPassword":"x"}"#,
        )
        .expect("an object");
        assert_eq!(fields.text("email").as_deref(), Ok("a@b.cd"));
        assert_eq!(fields.text("age").expect_err("a number").message, "must be a string");
        assert_eq!(fields.text("nick").expect_err("null").message, "is required");
        assert_eq!(fields.text_if_any("none"), Ok(None));
    }

    #[test]
    fn what_is_no_json_object_is_refused_without_quoting_it() {
        for body in
            ["{\"password\":\"geheim", "[\"geheim\"]", "\"geheim\"", "{\"a\":\"geheim\",\"a\":1}", "{geheim}", "null"]
        {
            let message = refusal(body);
            assert!(message.starts_with("body: ") && !message.contains("geheim"), "{body}: {message}");
        }
    }

    #[test]
    fn deep_nesting_is_refused_and_not_followed() {
        refusal(&format!("{{\"a\":{}", "[".repeat(10_000)));
    }

    #[test]
    fn a_type_is_asked_for_only_where_there_is_a_body() {
        assert_eq!(Fields::parse(&HeaderMap::new(), b""), Ok(Fields::default()));
        for (given, accepted) in [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("application/vnd.api+json", true),
            ("application/x-www-form-urlencoded", false),
            ("text/plain", false),
            ("text/json-ish", false),
        ] {
            assert_eq!(Fields::parse(&headers("content-type", given), b"{}").is_ok(), accepted, "{given}");
        }
        assert_eq!(Fields::parse(&HeaderMap::new(), b"{}"), Err(ApiError::UnsupportedMediaType));
        let odd = HeaderValue::from_bytes(b"application/json; name=\xfc").expect("a header");
        assert!(Fields::parse(&HeaderMap::from_iter([(header::CONTENT_TYPE, odd)]), b"{}").is_ok());
    }

    #[test]
    fn only_a_real_trace_context_travels_on() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(traceparent(good).as_deref(), Some(good));
        for bad in [
            "",
            "00",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
        ] {
            assert_eq!(traceparent(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_idempotency_key_is_one_short_line() {
        assert_eq!(idempotency_key(&HeaderMap::new()), Ok(None));
        assert_eq!(idempotency_key(&headers("idempotency-key", "a 1")), Ok(Some("a 1".to_owned())));
        assert!(idempotency_key(&headers("idempotency-key", "")).is_err());
        let mut two = headers("idempotency-key", "a");
        two.append("idempotency-key", HeaderValue::from_static("b"));
        assert!(idempotency_key(&two).is_err());
    }
}
