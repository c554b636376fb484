//! What operators ask with: a query's parameters, and the fields of a body.
//!
//! What is not known is refused: a parameter misspelt would otherwise be a filter left out.

use std::collections::BTreeMap;

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request, rejection::BytesRejection},
    http::{StatusCode, header, request::Parts},
};
use serde_json::{Map, Value};

use super::error::AdminError;
use crate::domain::FieldError;

const PAGE: i64 = 50;
const LARGEST_PAGE: i64 = 200;
const LONGEST_TEXT: usize = 300;
const LONGEST_REASON: usize = 1000;

/// Named texts, each to be taken out by whoever knows it; [`Params::finish`] tells what is wrong.
#[derive(Debug, Default)]
pub struct Params {
    given: BTreeMap<String, String>,
    errors: Vec<FieldError>,
}

impl Params {
    fn add(&mut self, name: String, value: String) {
        if self.given.contains_key(&name) {
            self.errors.push(FieldError::new("query", format!("has {name:?} twice")));
        }
        self.given.insert(name, value);
    }

    /// The fields of a JSON object, as if they were parameters.
    pub fn add_object(&mut self, object: Map<String, Value>) {
        for (name, value) in object {
            match value {
                Value::Null => {}
                Value::String(text) => self.add(name, text),
                Value::Number(number) => self.add(name, number.to_string()),
                _ => self.errors.push(FieldError::new("filter", format!("{name:?} must be a text or a number"))),
            }
        }
    }

    /// A parameter read by `read`; an empty one is one that is not given.
    pub fn take<T>(&mut self, name: &'static str, must: &str, read: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let text = self.given.remove(name).filter(|text| !text.is_empty())?;
        let value = read(&text);
        if value.is_none() {
            self.errors.push(FieldError::new(name, format!("must be {must}")));
        }
        value
    }

    /// A text the database can compare with.
    pub fn text(&mut self, name: &'static str) -> Option<String> {
        self.take(name, "at most 300 characters, none of them a control character", |text| {
            (text.chars().count() <= LONGEST_TEXT && !text.chars().any(char::is_control)).then(|| text.to_owned())
        })
    }

    /// The length of a page.
    pub fn limit(&mut self) -> i64 {
        let within = |text: &str| text.parse().ok().filter(|limit| (1..=LARGEST_PAGE).contains(limit));
        self.take("limit", "a number from 1 to 200", within).unwrap_or(PAGE)
    }

    /// Where a page begins: `nextCursor` of the page before.
    pub fn cursor<T: std::str::FromStr>(&mut self) -> Option<T> {
        self.take("cursor", "the nextCursor of the page before", |text| text.parse().ok())
    }

    /// Nothing was wrong, and nothing is left.
    pub fn finish(self) -> Result<(), AdminError> {
        let mut errors = self.errors;
        errors.extend(
            self.given.keys().map(|name| FieldError::new("query", format!("has an unknown parameter {name:?}"))),
        );
        if errors.is_empty() { Ok(()) } else { Err(AdminError::Validation(errors)) }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = AdminError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, AdminError> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri)
            .map_err(|_| AdminError::field("query", "can't be read: it must be percent-encoded UTF-8"))?;
        let mut params = Self::default();
        for (name, value) in pairs {
            params.add(name, value);
        }
        Ok(params)
    }
}

/// The id in a path, whatever it is: the one who looks it up says that there is no such thing.
#[derive(Debug)]
pub struct Id(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = AdminError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, AdminError> {
        // Not text at all: no id of ours.
        let path = Path::from_request_parts(parts, state).await;
        path.map(|Path(id)| Self(id)).map_err(|_| AdminError::NoRoute)
    }
}

/// What a change comes with.
#[derive(Debug, Default, PartialEq)]
pub struct Order {
    /// Why.
    pub reason: String,
    /// Only tell what would happen.
    pub dry_run: bool,
    /// Do what would be refused.
    pub force: bool,
    /// Of which rows.
    pub filter: Map<String, Value>,
}

impl Order {
    fn parse(is_json: bool, body: &[u8]) -> Result<Self, AdminError> {
        if body.is_empty() {
            return Err(AdminError::field("reason", "is required: it stands in the audit log"));
        }
        if !is_json {
            return Err(AdminError::UnsupportedMediaType);
        }
        let Ok(Value::Object(mut fields)) = serde_json::from_slice(body) else {
            return Err(AdminError::field("body", "must be a JSON object"));
        };
        let mut errors = vec![];
        let reason = match fields.remove("reason") {
            Some(Value::String(reason)) => reason.trim().to_owned(),
            None | Some(Value::Null) => String::new(),
            Some(_) => {
                errors.push(FieldError::new("reason", "must be a text"));
                String::new()
            }
        };
        if errors.is_empty() && reason.is_empty() {
            errors.push(FieldError::new("reason", "is required: it stands in the audit log"));
        }
        if reason.chars().count() > LONGEST_REASON || reason.chars().any(char::is_control) {
            errors.push(FieldError::new("reason", "must be at most 1000 characters, none of them a control character"));
        }
        let mut flag = |name: &'static str| match fields.remove(name) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(flag)) => flag,
            Some(_) => {
                errors.push(FieldError::new(name, "must be true or false"));
                false
            }
        };
        let (dry_run, force) = (flag("dryRun"), flag("force"));
        let filter = match fields.remove("filter") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(filter)) => filter,
            Some(_) => {
                errors.push(FieldError::new("filter", "must be an object, with the names of the list's parameters"));
                Map::new()
            }
        };
        errors.extend(fields.keys().map(|name| FieldError::new("body", format!("has an unknown field {name:?}"))));
        if errors.is_empty() {
            Ok(Self { reason, dry_run, force, filter })
        } else {
            Err(AdminError::Validation(errors))
        }
    }
}

impl<S: Send + Sync> FromRequest<S> for Order {
    type Rejection = AdminError;

    async fn from_request(request: Request, state: &S) -> Result<Self, AdminError> {
        let is_json = request
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split(';').next())
            .is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"));
        let body = Bytes::from_request(request, state).await.map_err(|rejection: BytesRejection| {
            match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => AdminError::PayloadTooLarge,
                _ => AdminError::field("body", "did not arrive whole"),
            }
        })?;
        Self::parse(is_json, &body)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    async fn params(query: &str) -> Result<Params, AdminError> {
        let (mut parts, ()) =
            Request::builder().uri(format!("/admin/outbox?{query}")).body(()).expect("a request").into_parts();
        Params::from_request_parts(&mut parts, &()).await
    }

    fn fields(error: AdminError) -> Vec<&'static str> {
        match error {
            AdminError::Validation(errors) => errors.iter().map(|error| error.field).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn what_is_given_is_read_and_what_is_not_has_its_default() {
        let mut given = params("topic=user.create&limit=7&cursor=42&key=").await.expect("readable");
        assert_eq!(given.text("topic").as_deref(), Some("user.create"));
        assert_eq!(given.text("key"), None);
        assert_eq!((given.limit(), given.cursor::<i64>()), (7, Some(42)));
        assert_eq!(given.finish(), Ok(()));
        assert_eq!(Params::default().limit(), PAGE);
    }

    #[tokio::test]
    async fn every_bad_parameter_is_named_at_once() {
        let mut given = params("limit=0&cursor=x&key=a%00b&statuss=parked").await.expect("readable");
        let _ = (given.limit(), given.cursor::<i64>(), given.text("key"));
        assert_eq!(fields(given.finish().unwrap_err()), ["limit", "cursor", "key", "query"]);
        for bad in ["limit=-1", "limit=201", "limit=1e2", "limit=99999999999999999999"] {
            let mut given = params(bad).await.expect("readable");
            given.limit();
            assert_eq!(fields(given.finish().unwrap_err()), ["limit"], "{bad}");
        }
        let twice = params("key=a&key=b").await.expect("readable");
        assert!(twice.finish().is_err());
    }

    #[test]
    fn a_change_needs_a_reason() {
        let order = |body: Value| Order::parse(true, body.to_string().as_bytes());
        assert_eq!(
            order(json!({ "reason": " broker fixed ", "dryRun": true })),
            Ok(Order { reason: "broker fixed".into(), dry_run: true, ..Order::default() })
        );
        for bad in [json!({}), json!({ "reason": " " }), json!({ "reason": null }), json!({ "reason": 5 })] {
            assert_eq!(fields(order(bad.clone()).unwrap_err()), ["reason"], "{bad}");
        }
        assert_eq!(fields(Order::parse(false, b"").unwrap_err()), ["reason"]);
        assert_eq!(fields(order(json!({ "reason": "a\0b" })).unwrap_err()), ["reason"]);
    }

    #[test]
    fn a_body_that_is_no_order_is_refused() {
        let refused = |body: &[u8]| fields(Order::parse(true, body).unwrap_err());
        for body in [&b"nonsense"[..], b"[]", b"\"x\"", b"null", b"\xff", &[b'['; 9000]] {
            assert_eq!(refused(body), ["body"]);
        }
        assert_eq!(
            refused(br#"{"reason":"r","dryRun":"yes","force":1,"filter":[],"dryrun":true}"#),
            ["dryRun", "force", "filter", "body"]
        );
        assert_eq!(Order::parse(false, b"{}"), Err(AdminError::UnsupportedMediaType));
    }

    #[test]
    fn a_filter_in_the_body_reads_like_one_in_the_query() {
        let mut params = Params::default();
        params.add_object(json!({ "key": 7, "topic": "t", "sagaId": null }).as_object().cloned().expect("an object"));
        assert_eq!((params.text("key"), params.text("topic")), (Some("7".into()), Some("t".into())));
        assert_eq!(params.finish(), Ok(()));
        let mut params = Params::default();
        params.add_object(json!({ "key": ["a"] }).as_object().cloned().expect("an object"));
        assert_eq!(fields(params.finish().unwrap_err()), ["filter"]);
    }
}
