//! What outsiders can open, hold and repeat, on every listener.

use std::{collections::BTreeSet, time::Duration};

use auth_service::app::Role;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::support::{TestService, eventually, service::Wishes};

/// Far above every deadline of these tests, far below the defaults.
const PATIENCE: Duration = Duration::from_secs(8);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

async fn service(vars: &[(&'static str, &str)]) -> TestService {
    let short = [
        ("REQUEST_HEADER_TIMEOUT", "500ms"),
        ("REQUEST_BODY_TIMEOUT", "500ms"),
        ("RESPONSE_WRITE_TIMEOUT", "1s"),
        ("HTTP_IDLE_TIMEOUT", "1s"),
        ("GRPC_IDLE_TIMEOUT", "1s"),
        ("ADMIN_IDLE_TIMEOUT", "1s"),
    ];
    let vars = short.iter().chain(vars).map(|(name, value)| (*name, (*value).to_owned())).collect();
    let roles = Some(vec![Role::Http, Role::Grpc, Role::Admin]);
    TestService::with(Wishes { roles, vars, no_topics: true, ..Wishes::default() }).await
}

async fn connect(url: &str) -> TcpStream {
    TcpStream::connect(url.trim_start_matches("http://")).await.expect("a connection")
}

/// What comes until the other side closes.
async fn until_closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut read = vec![];
    // A reset is an end, too.
    let _ = timeout(PATIENCE, stream.read_to_end(&mut read)).await.expect("it is closed in time");
    read
}

async fn asked(url: &str, request: &[u8]) -> (String, Value) {
    let mut stream = connect(url).await;
    stream.write_all(request).await.expect("sent");
    let answer = String::from_utf8(until_closed(&mut stream).await).expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    (head.to_owned(), serde_json::from_str(body).unwrap_or(Value::Null))
}

/// `GET /auth/health/live` as the first stream.
fn http2_request() -> Vec<u8> {
    let path = b"/auth/health/live";
    let mut block = vec![0x82, 0x86, 0x41, 1, b'x', 0x04, path.len() as u8];
    block.extend(path);
    let mut frames = [PREFACE, SETTINGS, &[0, 0, block.len() as u8, 1, 5, 0, 0, 0, 1]].concat();
    frames.extend(block);
    frames
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_waits_for_its_client_is_closed_in_time() {
    let service = service(&[]).await;
    let body = b"POST /auth/login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{";
    let keep_alive = b"GET /auth/health/live HTTP/1.1\r\nhost: x\r\n\r\n";
    let second = [&keep_alive[..], b"GET /auth"].concat();
    let settled = [PREFACE, SETTINGS].concat();
    let http2 = http2_request();
    let openings: [&[u8]; 8] = [b"", b"PRI * HT", b"GET / HT", keep_alive, &second, body, &settled, &http2];
    for url in [&service.http, &service.admin, &service.grpc] {
        for opening in openings {
            let mut stream = connect(url).await;
            stream.write_all(opening).await.expect("sent");
            until_closed(&mut stream).await;
        }
    }
    // One byte at a time is no progress.
    for url in [&service.http, &service.admin] {
        let mut stream = connect(url).await;
        let drip = async {
            for byte in b"GET /".iter().chain(std::iter::repeat(&b'a')) {
                if stream.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(PATIENCE, drip).await.expect("it is closed in time");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_taken_is_given_up() {
    let service = service(&[("ADMIN_IDLE_TIMEOUT", "1h"), ("HTTP_IDLE_TIMEOUT", "1h")]).await;
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    let address = service.admin.trim_start_matches("http://").parse().expect("an address");
    let mut stream = socket.connect(address).await.expect("a connection");
    let asking = async { while stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await.is_ok() {} };
    timeout(PATIENCE * 3, asking).await.expect("it is closed in time");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_that_says_nothing_keeps_nobody_out() {
    let vars = [
        ("HTTP_MAX_CONNECTIONS", "40"),
        ("GRPC_MAX_CONNECTIONS", "40"),
        ("ADMIN_MAX_CONNECTIONS", "40"),
        ("REQUEST_HEADER_TIMEOUT", "5m"),
        ("HTTP_IDLE_TIMEOUT", "1h"),
    ];
    let service = service(&vars).await;
    service.registered("somebody").await;
    let mut crowd = vec![];
    for url in [&service.http, &service.admin, &service.grpc] {
        for i in 0..150 {
            let mut stream = connect(url).await;
            // Some of them have had an answer, and some a half one.
            if i % 3 > 0 {
                let request: &[u8] =
                    if i % 3 == 1 { b"GET /auth/health/live HTTP/1.1\r\nhost: x\r\n\r\n" } else { b"GE" };
                let _ = stream.write_all(request).await;
            }
            crowd.push(stream);
        }
    }
    let client = || reqwest::Client::builder().timeout(PATIENCE).build().expect("a client");
    let ready = client().get(format!("{}/auth/health/ready", service.http)).send().await.expect("an answer");
    assert_eq!(ready.status(), 200);
    let login = client().post(format!("{}/auth/login", service.http));
    let login = login.json(&json!({ "identifier": "somebody", "password": "a long enough secret" }));
    assert_eq!(login.send().await.expect("an answer").status(), 200);
    let metrics = client().get(format!("{}/metrics", service.admin)).send().await.expect("an answer");
    let metrics = metrics.text().await.expect("text");
    assert!(metrics.contains("auth_connections_closed_total{listener=\"http\",reason=\"evicted\"}"), "{metrics}");
    let channel = tonic::transport::Endpoint::from_shared(service.grpc.clone()).expect("an address").connect_lazy();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let check = health.check(tonic_health::pb::HealthCheckRequest::default());
    timeout(PATIENCE, check).await.expect("in time").expect("an answer");
    drop(crowd);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_read_is_answered_like_every_other_error() {
    let service = service(&[]).await;
    let headers = |count| (0..count).map(|i| format!("x-{i}: 1\r\n")).collect::<String>();
    let huge = "x".repeat(200_000);
    for (request, status, code) in [
        (format!("GET /auth/me HTTP/1.1\r\nhost: x\r\n{}\r\n", headers(100)), 431, "HEADERS_TOO_LARGE"),
        (format!("GET /auth/me HTTP/1.1\r\nhost: x\r\n{}\r\n", headers(20_000)), 431, "HEADERS_TOO_LARGE"),
        (format!("GET /auth/me HTTP/1.1\r\nhost: x\r\nx: {huge}\r\n\r\n"), 431, "HEADERS_TOO_LARGE"),
        (format!("GET /{huge} HTTP/1.1\r\nhost: x\r\n\r\n"), 431, "HEADERS_TOO_LARGE"),
        ("GET /auth/me HTTP/1.1\r\nho st: x\r\n\r\n".to_owned(), 400, "BAD_REQUEST"),
        ("G\u{1}T / HTTP/1.1\r\n\r\n".to_owned(), 400, "BAD_REQUEST"),
        ("GET / HTTP/7.7\r\n\r\n".to_owned(), 400, "BAD_REQUEST"),
        ("POST /auth/login HTTP/1.1\r\nhost: x\r\ntransfer-encoding: x\r\n\r\n".to_owned(), 400, "BAD_REQUEST"),
    ] {
        for url in [&service.http, &service.admin] {
            let (head, body) = asked(url, request.as_bytes()).await;
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}\n{body}");
            assert!(head.contains("\r\nx-request-id: "), "{head}");
            assert_eq!((&body["statusCode"], &body["errorCode"]), (&json!(status), &json!(code)));
            assert_eq!(body["error"]["message"], body["message"]);
        }
    }
    // What is read, and only unusual, is answered by the routes.
    for (line, statuses) in [
        ("CONNECT x:1 HTTP/1.1", [404, 405]),
        ("TRACE /auth/me HTTP/1.1", [404, 405]),
        ("GET http://x/auth/health/live HTTP/1.1", [200, 200]),
        ("HEAD /nothing HTTP/1.1", [404, 404]),
    ] {
        let (head, _) =
            asked(&service.http, format!("{line}\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await;
        assert!(statuses.iter().any(|status| head.starts_with(&format!("HTTP/1.1 {status} "))), "{line}: {head}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_headers_are_read_where_that_is_set() {
    let service = service(&[("REQUEST_MAX_HEADERS", "300")]).await;
    let headers: String = (0..250).map(|i| format!("x-{i}: 1\r\n")).collect();
    let request = format!("GET /auth/health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
    let (head, _) = asked(&service.http, request.as_bytes()).await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_has_said_all_gets_its_answer() {
    let service = service(&[]).await;
    let mut stream = connect(&service.http).await;
    stream.write_all(b"GET /auth/health/ready HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
    stream.shutdown().await.expect("half closed");
    let answer = String::from_utf8(until_closed(&mut stream).await).expect("text");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    service.stop().await;
}

/// Names and labels, without the values.
async fn series(service: &TestService) -> BTreeSet<String> {
    let text = reqwest::get(format!("{}/metrics", service.admin)).await.expect("an answer").text().await.expect("text");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn inventions_make_no_series() {
    let service = service(&[("GRPC_IDLE_TIMEOUT", "10m")]).await;
    let channel = tonic::transport::Endpoint::from_shared(service.grpc.clone()).expect("an address").connect_lazy();
    let flood = async |round: u32| {
        for i in 0..40 {
            let word = format!("w{round}x{i}");
            for path in [format!("/auth.v1.AccountService/{word}"), format!("/{word}.v1.X/Y"), format!("/{word}")] {
                let mut client = tonic::client::Grpc::new(channel.clone());
                client.ready().await.expect("connected");
                let path = path.parse().expect("a path");
                let codec = tonic_prost::ProstCodec::<(), ()>::default();
                let _ = client.unary(tonic::Request::new(()), path, codec).await;
            }
            let method = Method::from_bytes(word.to_uppercase().as_bytes()).expect("a method");
            for url in [&service.http, &service.admin] {
                for path in [format!("/auth/{word}"), format!("/{word}?a={word}"), format!("/admin/outbox/{word}")] {
                    for method in [Method::GET, method.clone()] {
                        let request = service.client.request(method, format!("{url}{path}"));
                        let request = request.header("x-request-id", &word).header("user-agent", &word);
                        request.header("origin", format!("http://{word}")).send().await.expect("an answer");
                    }
                }
            }
        }
    };
    flood(0).await;
    let before = eventually("the series are there", || async {
        let series = series(&service).await;
        series.iter().any(|name| name.contains("grpc_request_seconds")).then_some(series)
    })
    .await;
    flood(1).await;
    let new: Vec<_> = series(&service).await.difference(&before).cloned().collect();
    // Other tests of this process record too; what these inputs made would have their words.
    let invented: Vec<_> = new.iter().filter(|name| name.contains("w1x")).collect();
    assert!(invented.is_empty(), "{invented:?}");
    assert!(before.iter().all(|name| !name.contains("w0x")), "{before:?}");
    service.stop().await;
}
