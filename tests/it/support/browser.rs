//! A client that keeps cookies, and shows them.

use std::{collections::BTreeMap, sync::Mutex};

use auth_service::app::Role;
use reqwest::{Method, RequestBuilder, Response, header};
use serde_json::Value;

use super::{TestService, service::Wishes};

/// One person's cookie jar.
#[derive(Default)]
pub struct Browser(Mutex<BTreeMap<String, String>>);

impl Browser {
    /// Signed in by a fresh registration.
    pub async fn registered(service: &TestService, username: &str) -> Self {
        let browser = Self::default();
        let response = browser.take(service.register(username).await);
        assert_eq!(response.status(), 201);
        browser
    }

    /// Signed in by a login.
    pub async fn logged_in(service: &TestService, username: &str) -> Self {
        let browser = Self::default();
        let body = serde_json::json!({ "identifier": username, "password": "a long enough secret" });
        let response = browser.send(service, Method::POST, "/auth/login", Some(body)).await;
        assert_eq!(response.status(), 200);
        browser
    }

    pub fn cookie(&self, name: &str) -> String {
        self.0.lock().unwrap().get(name).cloned().unwrap_or_default()
    }

    pub fn set(&self, name: &str, value: impl Into<String>) {
        self.0.lock().unwrap().insert(name.to_owned(), value.into());
    }

    pub fn forget(&self, name: &str) {
        self.0.lock().unwrap().remove(name);
    }

    /// With the cookies it has.
    pub fn request(&self, service: &TestService, method: Method, path: &str) -> RequestBuilder {
        let cookies: Vec<String> =
            self.0.lock().unwrap().iter().map(|(name, value)| format!("{name}={value}")).collect();
        service.request(method, path).header(header::COOKIE, cookies.join("; "))
    }

    /// Sends, and keeps the cookies that come back.
    pub async fn send(&self, service: &TestService, method: Method, path: &str, body: Option<Value>) -> Response {
        let mut request = self.request(service, method, path);
        if let Some(body) = body {
            request = request.json(&body);
        }
        self.take(request.send().await.expect("an answer"))
    }

    pub async fn get(&self, service: &TestService, path: &str) -> Response {
        self.send(service, Method::GET, path, None).await
    }

    fn take(&self, response: Response) -> Response {
        for cookie in set_cookies(&response) {
            let (pair, attributes) = cookie.split_once(';').expect("attributes");
            let (name, value) = pair.split_once('=').expect("a cookie");
            match attributes.contains("Max-Age=0") {
                true => self.forget(name),
                false => self.set(name, value),
            }
        }
        response
    }
}

/// All Set-Cookie values of an answer.
pub fn set_cookies(response: &Response) -> Vec<String> {
    let values = response.headers().get_all(header::SET_COOKIE);
    values.iter().map(|value| value.to_str().expect("ASCII").to_owned()).collect()
}

/// The code of an error's answer, after a look at its shape.
#[track_caller]
pub fn code(body: &Value) -> &str {
    let code = body["errorCode"].as_str().unwrap_or_else(|| panic!("no errorCode in {body}"));
    assert_eq!(body["error"]["code"], code, "{body}");
    assert_eq!(body["error"]["message"], body["message"], "{body}");
    assert!(body["statusCode"].is_u64() && body["message"].is_string(), "{body}");
    code
}

impl TestService {
    /// REST alone: most of it needs no broker.
    pub async fn rest() -> Self {
        Self::rest_with(&[]).await
    }

    pub async fn rest_with(vars: &[(&'static str, &str)]) -> Self {
        let vars = vars.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        let roles = Some(vec![Role::Http]);
        Self::with(Wishes { roles, vars, no_topics: true, ..Wishes::default() }).await
    }
}
