//! The operators' port.

use auth_service::app::Role;
use reqwest::{Method, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::support::{
    TestService,
    browser::code,
    eventually,
    outbox::WAITING,
    service::{ADMIN_TOKEN, READ_TOKEN, Wishes, sha2_hex},
};

/// May change things, but force nothing.
const OPERATE_TOKEN: &str = "adm_test_token_that_may_operate";

/// No relay: what is appended stays.
async fn service(vars: &[(&'static str, &str)]) -> TestService {
    let tokens = [("root", "admin", ADMIN_TOKEN), ("viewer", "read", READ_TOKEN), ("ops", "operate", OPERATE_TOKEN)]
        .map(|(name, scope, token)| format!("{name}:{scope}:{}", sha2_hex(token)));
    let mut vars: Vec<_> = vars.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    vars.push(("ADMIN_TOKENS", tokens.join(",")));
    let roles = Some(vec![Role::Http, Role::Admin]);
    TestService::with(Wishes { roles, vars, no_topics: true, ..Wishes::default() }).await
}

async fn get(service: &TestService, path: &str) -> Response {
    service.admin(Method::GET, path, READ_TOKEN).await.send().await.expect("an answer")
}

async fn data(service: &TestService, path: &str) -> Value {
    let response = get(service, path).await;
    assert_eq!(response.status(), 200, "{path}");
    response.json::<Value>().await.expect("JSON")["data"].clone()
}

async fn post(service: &TestService, token: &str, path: &str, body: Value) -> (StatusCode, Value) {
    let response = service.admin(Method::POST, path, token).await.json(&body).send().await.expect("an answer");
    (response.status(), response.json().await.expect("JSON"))
}

/// What the relay does with a message that is too large, and with those behind it.
async fn park_everything(service: &TestService) {
    sqlx::raw_sql(
        "insert into outbox_parked (id, lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of, created_at, reason)
         select id, lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of, created_at, 'too large' from outbox;
         insert into outbox_blocked (key, row_id) select key, min(id) from outbox group by key;
         delete from outbox",
    )
    .execute(&service.db)
    .await
    .unwrap();
}

/// What the relay does with a message the broker has acknowledged.
async fn publish_everything(service: &TestService) {
    sqlx::raw_sql(
        "insert into outbox_archive (id, lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of, created_at,
                                     partition, \"offset\", relay_id, term)
         select id, lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of, created_at,
                0, id, gen_random_uuid(), 1 from outbox;
         delete from outbox",
    )
    .execute(&service.db)
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_without_a_good_token() {
    let service = service(&[]).await;
    for path in ["/admin/outbox", "/admin/outbox/1", "/admin/sagas", "/admin/relay", "/admin/audit", "/admin/nothing"] {
        for authorization in [None, Some("Bearer wrong"), Some("Bearer "), Some("Basic cm9vdDpyb290")] {
            let mut request = service.client.get(format!("{}{path}", service.admin));
            if let Some(authorization) = authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 401, "{path} {authorization:?}");
            assert_eq!(response.headers()[header::WWW_AUTHENTICATE], "Bearer");
            assert!(response.headers().contains_key("x-request-id"));
            assert_eq!(code(&response.json().await.unwrap()), "UNAUTHORIZED");
        }
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_question_gets_its_documented_answer() {
    let service = service(&[]).await;
    for (path, status, expected) in [
        ("/admin/outbox?status=lost", 400, "VALIDATION_ERROR"),
        ("/admin/outbox?limit=0", 400, "VALIDATION_ERROR"),
        ("/admin/outbox?limit=201", 400, "VALIDATION_ERROR"),
        ("/admin/outbox?limit=ten", 400, "VALIDATION_ERROR"),
        ("/admin/outbox?cursor=x", 400, "VALIDATION_ERROR"),
        ("/admin/outbox?sagaId=7", 400, "VALIDATION_ERROR"),
        ("/admin/outbox?key=%00", 400, "VALIDATION_ERROR"),
        ("/admin/outbox?stat=parked", 400, "VALIDATION_ERROR"),
        ("/admin/outbox?key=1&key=2", 400, "VALIDATION_ERROR"),
        ("/admin/sagas?status=gone", 400, "VALIDATION_ERROR"),
        ("/admin/sagas?userId=ada", 400, "VALIDATION_ERROR"),
        ("/admin/sagas?cursor=7", 400, "VALIDATION_ERROR"),
        ("/admin/audit?limit=-1", 400, "VALIDATION_ERROR"),
        ("/admin/outbox/999", 404, "NOT_FOUND"),
        ("/admin/outbox/-1", 404, "NOT_FOUND"),
        ("/admin/outbox/x", 404, "NOT_FOUND"),
        ("/admin/outbox/99999999999999999999", 404, "NOT_FOUND"),
        ("/admin/outbox/%ff", 404, "NOT_FOUND"),
        ("/admin/sagas/x", 404, "NOT_FOUND"),
        ("/admin/sagas/0198c0de-0000-7000-8000-000000000001", 404, "NOT_FOUND"),
        ("/admin/nothing", 404, "NOT_FOUND"),
        ("/admin/outbox/replay", 405, "METHOD_NOT_ALLOWED"),
        ("/admin/relay/pause", 405, "METHOD_NOT_ALLOWED"),
    ] {
        let response = get(&service, path).await;
        assert_eq!(response.status(), status, "{path}");
        assert_eq!(code(&response.json().await.unwrap()), expected, "{path}");
    }
    for (what, path, body, status, expected) in [
        ("no body", "/admin/relay/pause", "", 400, "VALIDATION_ERROR"),
        ("no JSON", "/admin/relay/pause", "reason", 400, "VALIDATION_ERROR"),
        ("no object", "/admin/relay/pause", "[]", 400, "VALIDATION_ERROR"),
        ("no reason", "/admin/relay/pause", "{}", 400, "VALIDATION_ERROR"),
        ("an empty reason", "/admin/outbox/replay", r#"{"reason":" "}"#, 400, "VALIDATION_ERROR"),
        ("a reason that is none", "/admin/outbox/replay", r#"{"reason":7}"#, 400, "VALIDATION_ERROR"),
        ("a flag that is none", "/admin/outbox/replay", r#"{"reason":"r","dryRun":"yes"}"#, 400, "VALIDATION_ERROR"),
        ("a misspelt flag", "/admin/outbox/replay", r#"{"reason":"r","dryrun":true}"#, 400, "VALIDATION_ERROR"),
        ("a NUL", "/admin/outbox/replay", r#"{"reason":"a\u0000"}"#, 400, "VALIDATION_ERROR"),
        ("pending", "/admin/outbox/replay?status=pending", r#"{"reason":"r"}"#, 400, "VALIDATION_ERROR"),
        ("all of history", "/admin/outbox/replay?status=published", r#"{"reason":"r"}"#, 400, "VALIDATION_ERROR"),
        ("an unknown row", "/admin/outbox/999/replay", r#"{"reason":"r"}"#, 404, "NOT_FOUND"),
        ("no row", "/admin/outbox/x/replay", r#"{"reason":"r"}"#, 404, "NOT_FOUND"),
    ] {
        let request = service.admin(Method::POST, path, ADMIN_TOKEN).await;
        let response = request.header(header::CONTENT_TYPE, "application/json").body(body).send().await.unwrap();
        assert_eq!(response.status(), status, "{what}");
        assert_eq!(code(&response.json().await.unwrap()), expected, "{what}");
    }
    let request = service.admin(Method::POST, "/admin/relay/pause", ADMIN_TOKEN).await;
    let response = request.header(header::CONTENT_TYPE, "text/plain").body("{}").send().await.unwrap();
    assert_eq!(response.status(), 415);
    let body = json!({ "reason": "x".repeat(20_000) });
    assert_eq!(post(&service, ADMIN_TOKEN, "/admin/relay/pause", body).await.0, 413);
    assert_eq!(service.count("select count(*) from admin_audit").await, 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_listed_newest_first_a_page_at_a_time_wherever_they_are() {
    let service = service(&[]).await;
    service.registered("ada").await;
    publish_everything(&service).await;
    service.registered("bob").await;
    park_everything(&service).await;
    let saga = service.registered("eve").await["sagaId"].clone();
    let rows = data(&service, "/admin/outbox").await;
    let statuses: Vec<_> = rows.as_array().unwrap().iter().map(|row| row["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, ["pending", "parked", "published"]);
    assert_eq!(rows[0]["payload"]["username"], "eve");
    assert_eq!((&rows[1]["reason"], &rows[2]["partition"]), (&json!("too large"), &json!(0)));

    for (status, name) in [("pending", "eve"), ("parked", "bob"), ("published", "ada")] {
        let path = format!("/admin/outbox?status={status}&topic={}", service.topic("user.create"));
        let only = data(&service, &path).await;
        assert_eq!(only.as_array().unwrap().len(), 1, "{status}");
        assert_eq!(only[0]["payload"]["username"], name);
        let path = format!("/admin/outbox/{}", only[0]["id"]);
        assert_eq!(data(&service, &path).await, only[0]);
    }
    let of_saga = data(&service, &format!("/admin/outbox?sagaId={}", saga.as_str().unwrap())).await;
    assert_eq!(of_saga, json!([rows[0]]));

    let mut walked = vec![];
    let mut cursor = String::new();
    loop {
        let page: Value = get(&service, &format!("/admin/outbox?limit=1&cursor={cursor}")).await.json().await.unwrap();
        walked.extend(page["data"].as_array().unwrap().clone());
        match page["nextCursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(json!(walked), rows);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saga_is_shown_with_everything_that_happened_to_it() {
    let service = service(&[]).await;
    let user = service.registered("ada").await;
    service.registered("bob").await;
    let found = data(&service, &format!("/admin/sagas?status=running&name=create_user&userId={}", user["id"])).await;
    assert_eq!(found.as_array().unwrap().len(), 1);
    assert_eq!(found[0]["sagaId"], user["sagaId"]);
    let shown = data(&service, &format!("/admin/sagas/{}", user["sagaId"].as_str().unwrap())).await;
    assert_eq!((&shown["status"], &shown["timeline"][0]["event"]), (&json!("running"), &json!("started")));
    let page: Value = get(&service, "/admin/sagas?limit=1").await.json().await.unwrap();
    let cursor = page["nextCursor"].as_str().unwrap();
    assert_eq!(data(&service, &format!("/admin/sagas?limit=1&cursor={cursor}")).await[0]["sagaId"], user["sagaId"]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_row_goes_out_again_and_the_log_says_who_and_why() {
    let service = service(&[]).await;
    service.registered("ada").await;
    park_everything(&service).await;
    let id = data(&service, "/admin/outbox?status=parked").await[0]["id"].clone();
    let path = format!("/admin/outbox/{id}/replay");

    let dry = json!({ "reason": "limit raised", "dryRun": true });
    let (status, body) = post(&service, OPERATE_TOKEN, &path, dry).await;
    assert_eq!((status, &body["data"]["rows"]), (StatusCode::OK, &json!([id])));
    assert_eq!(service.count("select count(*) from outbox_parked").await, 1);
    assert_eq!(service.count("select count(*) from admin_audit").await, 0);

    let (status, body) = post(&service, OPERATE_TOKEN, &path, json!({ "reason": "limit raised" })).await;
    assert_eq!((status, &body["data"]["replayed"]), (StatusCode::OK, &json!("parked")));
    assert_eq!(service.count("select count(*) from outbox_parked").await, 0);
    assert_eq!(service.count("select count(*) from outbox").await, 1);
    // Again: it is on its way.
    let (status, body) = post(&service, OPERATE_TOKEN, &path, json!({ "reason": "again" })).await;
    assert_eq!((status, code(&body)), (StatusCode::CONFLICT, "REFUSED"));

    let log = data(&service, "/admin/audit").await;
    let lines: Vec<_> = log.as_array().unwrap().iter().map(|line| (&line["outcome"], &line["reason"])).collect();
    assert_eq!(lines, [(&json!("refused"), &json!("again")), (&json!("done"), &json!("limit raised"))]);
    assert_eq!((&log[1]["actor"], &log[1]["action"]), (&json!("ops"), &json!("outbox.replay")));
    assert_eq!((&log[1]["target"], &log[1]["detail"]["did"]["rows"]), (&json!(format!("row {id}")), &json!([id])));
    assert_eq!(data(&service, "/admin/audit?actor=root").await, json!([]));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_be_done_is_not_done_and_is_in_the_log() {
    let service = service(&[]).await;
    service.registered("ada").await;
    publish_everything(&service).await;
    sqlx::query("update outbox_keys set last_seq = last_seq + 1").execute(&service.db).await.unwrap();
    let id = data(&service, "/admin/outbox?status=published").await[0]["id"].clone();
    let path = format!("/admin/outbox/{id}/replay");

    let (status, body) = post(&service, READ_TOKEN, &path, json!({ "reason": "curious" })).await;
    assert_eq!((status, code(&body)), (StatusCode::FORBIDDEN, "FORBIDDEN"));
    // A later message of its key is out.
    let (status, body) = post(&service, OPERATE_TOKEN, &path, json!({ "reason": "lost" })).await;
    assert_eq!((status, code(&body)), (StatusCode::CONFLICT, "REFUSED"));
    let forced = json!({ "reason": "really", "force": true });
    let (status, _) = post(&service, OPERATE_TOKEN, &path, forced.clone()).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert_eq!(service.count("select count(*) from outbox").await, 0);
    let (status, body) = post(&service, ADMIN_TOKEN, &path, forced).await;
    assert_eq!((status, &body["data"]["replayOf"]), (StatusCode::OK, &id));
    assert_eq!(
        service.count("select count(*) from outbox o join outbox_archive a using (message_id)").await,
        1,
        "under its old id"
    );
    let log = data(&service, "/admin/audit").await;
    let outcomes: Vec<_> = log.as_array().unwrap().iter().map(|line| line["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["done", "forbidden", "refused", "forbidden"]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_rows_go_out_again_in_one_transaction_with_one_line() {
    let service = service(&[]).await;
    for name in ["ada", "bob", "eve"] {
        service.registered(name).await;
    }
    park_everything(&service).await;
    let id = data(&service, "/admin/outbox?status=parked").await[0]["key"].clone();
    let one = json!({ "reason": "one of them", "filter": { "key": id } });
    let (status, body) = post(&service, OPERATE_TOKEN, "/admin/outbox/replay", one).await;
    assert_eq!((status, body["data"]["replayed"].as_array().unwrap().len()), (StatusCode::OK, 1));

    let dry = json!({ "reason": "all", "dryRun": true });
    let path = format!("/admin/outbox/replay?topic={}", service.topic("user.create"));
    let (_, body) = post(&service, OPERATE_TOKEN, &path, dry).await;
    assert_eq!(body["data"]["replayed"].as_array().unwrap().len(), 2);
    assert_eq!(service.count("select count(*) from outbox_parked").await, 2);
    let (_, body) = post(&service, OPERATE_TOKEN, "/admin/outbox/replay", json!({ "reason": "all" })).await;
    assert_eq!(body["data"]["replayed"].as_array().unwrap().len(), 2);
    assert_eq!(service.count("select count(*) from outbox_parked").await, 0);
    assert_eq!(service.count("select count(*) from outbox").await, 3);
    let (_, body) = post(&service, OPERATE_TOKEN, "/admin/outbox/replay", json!({ "reason": "all" })).await;
    assert_eq!(body["data"]["replayed"], json!([]));

    publish_everything(&service).await;
    sqlx::query("update outbox_keys set last_seq = last_seq + 1 where key = $1")
        .bind(id.as_str().unwrap())
        .execute(&service.db)
        .await
        .unwrap();
    let again = json!({ "reason": "a consumer lost them" });
    let path = format!("{path}&status=published");
    let (_, body) = post(&service, OPERATE_TOKEN, &path, again).await;
    assert_eq!(body["data"]["replayed"].as_array().unwrap().len(), 2);
    assert_eq!(body["data"]["refused"].as_array().unwrap().len(), 1);
    let log = data(&service, "/admin/audit?action=outbox.replay").await;
    let outcomes: Vec<_> = log.as_array().unwrap().iter().map(|line| line["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["done", "unchanged", "done", "done"]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relays_are_paused_and_go_on() {
    let service = service(&[]).await;
    let reason = json!({ "reason": "broker upgrade" });
    assert_eq!(post(&service, READ_TOKEN, "/admin/relay/pause", reason.clone()).await.0, StatusCode::FORBIDDEN);
    for (path, changed) in [("pause", true), ("pause", false), ("resume", true), ("resume", false)] {
        let (status, body) = post(&service, OPERATE_TOKEN, &format!("/admin/relay/{path}"), reason.clone()).await;
        assert_eq!((status, &body["data"]["changed"]), (StatusCode::OK, &json!(changed)), "{path}");
        let status = data(&service, "/admin/relay").await;
        let by = if path == "pause" { json!("ops") } else { Value::Null };
        assert_eq!(status["pausedBy"], by);
        assert_eq!(status["lanes"].as_array().unwrap().len(), 64);
    }
    let log = data(&service, "/admin/audit").await;
    let outcomes: Vec<_> = log.as_array().unwrap().iter().map(|line| line["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["unchanged", "done", "unchanged", "done", "forbidden"]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_what_the_database_knows_and_go_on_without_it() {
    let service = service(&[("DB_ACQUIRE_TIMEOUT", "1s")]).await;
    service.registered("ada").await;
    service.registered("bob").await;
    let scrape = async || {
        let response = service.client.get(format!("{}/metrics", service.admin)).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(response.headers()[header::CONTENT_TYPE].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
        response.text().await.unwrap()
    };
    let text = scrape().await;
    for line in [
        "auth_database_up 1",
        "auth_outbox_pending 2",
        "auth_outbox_parked 0",
        "auth_sagas{name=\"create_user\",status=\"running\"} 2",
        "auth_sagas{name=\"create_user\",status=\"stuck\"} 0",
        "auth_inbox_attention{outcome=\"rejected\"} 0",
        "auth_db_pool_max_connections 10",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    let oldest = text.lines().find_map(|line| line.strip_prefix("auth_outbox_oldest_unsent_seconds "));
    assert!(oldest.unwrap().parse::<f64>().unwrap() > 0.0);
    assert!(text.contains("auth_hash_seconds_bucket"), "{text}");

    service.cut_database().await;
    crate::support::eventually("metrics say that the database is away", || async {
        let text = scrape().await;
        let away = text.lines().any(|line| line == "auth_database_up 0");
        assert!(!away || !text.contains("auth_outbox_pending"));
        (away && text.contains("auth_hash_seconds_bucket")).then_some(())
    })
    .await;
    assert_eq!(get(&service, "/admin/outbox").await.status(), 503);
    service.mend_database().await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_can_ask_for_a_token() {
    let service = service(&[("METRICS_TOKEN_REQUIRED", "true")]).await;
    let response = service.client.get(format!("{}/metrics", service.admin)).send().await.unwrap();
    assert_eq!(response.status(), 401);
    assert_eq!(get(&service, "/metrics").await.status(), 200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replays_by_filter_lock_key_by_key_and_can_not_deadlock() {
    let service = service(&[]).await;
    for name in ["ada", "bob"] {
        service.registered(name).await;
    }
    park_everything(&service).await;
    // The newest first, as rows are listed: not the order in which they may be locked.
    let keys: Vec<String> =
        sqlx::query_scalar("select key from outbox_parked order by id").fetch_all(&service.db).await.unwrap();
    assert!(keys.is_sorted());
    let mut other = service.db.begin().await.unwrap();
    sqlx::query("set local lock_timeout = '500ms'").execute(&mut *other).await.unwrap();
    let lock = "select from outbox_blocked where key = $1 for update";
    sqlx::query(lock).bind(&keys[0]).execute(&mut *other).await.unwrap();
    let order = json!({ "reason": "both at once", "filter": { "status": "parked" } });
    let replay = post(&service, ADMIN_TOKEN, "/admin/outbox/replay", order);
    let other = async {
        eventually("the replay waits for the first key", || async {
            let waiting: i64 = sqlx::query_scalar(WAITING).fetch_one(&service.db).await.unwrap();
            (waiting == 1).then_some(())
        })
        .await;
        sqlx::query(lock).bind(&keys[1]).execute(&mut *other).await.expect("the second key is free");
        other.commit().await.unwrap();
    };
    let ((status, body), ()) = tokio::join!(replay, other);
    assert_eq!((status, body["data"]["replayed"].as_array().map(Vec::len)), (StatusCode::OK, Some(2)), "{body}");
    service.stop().await;
}
