//! Commands as the reference user-service reads them.

use std::collections::BTreeMap;

use auth_service::fuzzing::{self, Answered};
use serde_json::Value;

use super::Target;
use crate::parts::{parts, text};

/// The topic; header lines `name=value`; the value.
pub const TARGET: Target = Target {
    name: "user_command",
    seeds: &[
        b"user.create\x1esaga-id=0198c0de-0000-7000-8000-000000000001\nce_id=1\ncorrelationId=c\x1e{\"id\":7,\"username\":\"anna\",\"email\":\"a@b.cd\"}",
        b"user.delete\x1e\x1e{\"id\":7,\"sagaId\":\"0198c0de-0000-7000-8000-000000000001\",\"correlationId\":\"c\"}",
        b"user.create\x1esaga-id=x\x1e{\"id\":7.0,\"username\":\"a\\u0000\",\"email\":null}",
        b"user.close\x1etraceparent=00-1\x1e[7,\"anna\",\"a@b.cd\",null,null]",
    ],
    run,
};

fn run(input: &[u8]) {
    let [topic, lines, payload] = parts(input);
    let headers: BTreeMap<String, String> = text(lines)
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(n, v)| (n.to_owned(), v.to_owned()))
        .collect();
    // Kafka's names of topics are not longer.
    let topic = text(&topic[..topic.len().min(249)]);
    match fuzzing::command(&topic, &headers, Some(payload)) {
        Ok(Answered { headers, value }) => {
            let value: Value = serde_json::from_str(&value).expect("an answer in JSON");
            assert!(value["id"].is_i64() && value["sagaId"].is_string(), "{value}");
            let names: Vec<_> = headers.iter().map(|(name, _)| *name).collect();
            assert!(names.contains(&"saga-id") && names.contains(&"ce_id") && names.contains(&"correlationId"));
        }
        Err(problem) => assert!(problem.len() <= 500, "{} bytes: {problem:?}", problem.len()),
    }
}
