//! Registrations whose COMMIT is not answered: the connection to PostgreSQL runs through a proxy
//! that loses just that.

use std::sync::{Arc, Mutex};

use auth_service::app::Role;
use reqwest::{Method, Response, header};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::support::{
    TestService,
    browser::{Browser, code},
    parts::PARTS,
    service::{Wishes, registration},
};

/// What happens to a COMMIT.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// It does not reach the server.
    CommitLost,
    /// It does, and the answer is lost.
    AnswerLost,
    /// The answer is lost, and nobody gets through any more.
    AnswerLostAndAway,
    /// Nobody gets through.
    Away,
}

struct Proxy {
    fault: Arc<Mutex<Fault>>,
    port: u16,
}

impl Proxy {
    async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let fault = Arc::new(Mutex::new(Fault::None));
        let shared = fault.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(relay(client, server.clone(), shared.clone()));
            }
        });
        Self { fault, port }
    }

    fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }
}

async fn relay(mut client: TcpStream, server: String, fault: Arc<Mutex<Fault>>) {
    let Ok(mut server) = TcpStream::connect(server).await else {
        return;
    };
    let (mut up, mut down) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        if *fault.lock().unwrap() == Fault::Away {
            return;
        }
        tokio::select! {
            read = client.read(&mut up) => {
                let Ok(read @ 1..) = read else { return };
                let committing = up[..read].windows(7).any(|bytes| bytes == b"COMMIT\0");
                let now = *fault.lock().unwrap();
                if committing && now == Fault::CommitLost {
                    return;
                }
                if server.write_all(&up[..read]).await.is_err() {
                    return;
                }
                if committing && matches!(now, Fault::AnswerLost | Fault::AnswerLostAndAway) {
                    // The answer is there, so the transaction has committed; now lose it.
                    let _ = server.read(&mut down).await;
                    *fault.lock().unwrap() = if now == Fault::AnswerLost { Fault::None } else { Fault::Away };
                    return;
                }
            }
            read = server.read(&mut down) => {
                let Ok(read @ 1..) = read else { return };
                if client.write_all(&down[..read]).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn service() -> (TestService, Proxy) {
    let database = PARTS.database().await;
    let options = PARTS.connect_options(&database);
    let proxy = Proxy::to(format!("{}:{}", options.get_host(), options.get_port())).await;
    let direct = format!(":{}/", options.get_port());
    let url = PARTS.database_url(&database).replace(&direct, &format!(":{}/", proxy.port));
    let wishes = Wishes {
        roles: Some(vec![Role::Http]),
        vars: vec![("DATABASE_URL", url), ("DB_ACQUIRE_TIMEOUT", "1s".to_owned())],
        beside: Some((database, "doubt.".to_owned())),
        no_topics: true,
    };
    (TestService::with(wishes).await, proxy)
}

async fn register(service: &TestService) -> Response {
    let request = service.request(Method::POST, "/auth/register").header("idempotency-key", "the-one");
    request.json(&registration("ada")).send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_is_lost_is_found_out_to_have_happened() {
    let (service, proxy) = service().await;
    proxy.set(Fault::AnswerLost);
    let response = register(&service).await;
    assert_eq!(*proxy.fault.lock().unwrap(), Fault::None, "the answer was lost");
    assert_eq!(response.status(), 201);
    assert_eq!(service.count("select count(*) from auth_users").await, 1);
    assert_eq!(service.count("select count(*) from outbox").await, 1);
    assert_eq!(Browser::logged_in(&service, "ada").await.get(&service, "/me").await.status(), 200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_never_arrived_is_found_out_not_to_have_happened() {
    let (service, proxy) = service().await;
    proxy.set(Fault::CommitLost);
    let response = register(&service).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key(header::RETRY_AFTER));
    assert_eq!(code(&response.json().await.unwrap()), "SERVICE_UNAVAILABLE");
    assert_eq!(service.count("select count(*) from auth_users").await, 0);
    proxy.set(Fault::None);
    assert_eq!(register(&service).await.status(), 201);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_that_cannot_be_learnt_is_said_to_be_unknown_and_a_retry_gets_the_true_answer() {
    let (service, proxy) = service().await;
    proxy.set(Fault::AnswerLostAndAway);
    let response = register(&service).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key(header::RETRY_AFTER));
    assert_eq!(code(&response.json::<Value>().await.unwrap()), "OUTCOME_UNKNOWN");
    proxy.set(Fault::None);
    let retried = register(&service).await;
    assert_eq!(retried.status(), 201);
    assert_eq!(service.count("select count(*) from auth_users").await, 1);
    assert_eq!(service.count("select count(*) from outbox").await, 1);
    assert_eq!(service.count("select count(*) from refresh_tokens").await, 1);
    service.stop().await;
}
