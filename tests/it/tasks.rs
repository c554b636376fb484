//! Tasks that fail: started again, shown meanwhile, and the end of the process when that does not help.

use serde_json::Value;

use crate::support::{
    eventually,
    parts::PARTS,
    process::{Replica, production_vars, run},
};

/// Those of a process with every role; the relay of these tests has two workers.
const TASKS: [&str; 11] = [
    "http",
    "grpc",
    "admin",
    "wake-announcer",
    "metrics-upkeep",
    "relay-lease-keeper",
    "relay-wake-listener",
    "relay-worker-0",
    "reply-consumer",
    "saga-deadlines",
    "housekeeping",
];

async fn vars(fail: &str, more: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut vars = production_vars(&PARTS.database().await, "tasks.", more);
    vars.push(("FAILPOINTS".to_owned(), fail.to_owned()));
    vars
}

async fn get(url: &str) -> Option<(u16, String)> {
    let response = reqwest::get(url).await.ok()?;
    Some((response.status().as_u16(), response.text().await.ok()?))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_panics_is_started_again_and_readiness_and_metrics_show_it() {
    let fail: Vec<String> = TASKS.iter().map(|task| format!("task::{task}=2*panic")).collect();
    let vars = vars(&fail.join(";"), &[]).await;
    let mut replica = Replica::start(&["serve", "--arm-fault-points"], &vars);
    let up = eventually("it says that it is up", || async { replica.logged("is up").pop() }).await;
    let url = |port: &str, path: &str| format!("http://{}{path}", up[port].as_str().expect("an address"));

    // Whichever of them REST and the admin port still are, once they are back.
    let down = eventually("readiness names what is down", || async {
        let (status, body) = get(&url("http", "/auth/health/ready")).await?;
        let message = serde_json::from_str::<Value>(&body).ok()?["message"].as_str()?.to_owned();
        (status == 503 && message.contains("failed and not running again yet")).then_some(message)
    })
    .await;
    assert!(TASKS.iter().any(|task| down.contains(task)), "{down}");
    eventually("all of it runs again", || async {
        (get(&url("http", "/auth/health/ready")).await?.0 == 200).then_some(())
    })
    .await;
    let (_, metrics) = get(&url("admin", "/metrics")).await.expect("metrics");
    for task in TASKS {
        assert!(metrics.contains(&format!("auth_task_restarts_total{{task=\"{task}\"}} 2\n")), "{task}: {metrics}");
        assert!(metrics.contains(&format!("auth_task_up{{task=\"{task}\"}} 1\n")), "{task}: {metrics}");
        assert_eq!(replica.logged("a task failed").iter().filter(|line| line["task"] == *task).count(), 2, "{task}");
    }
    replica.terminate();
    assert_eq!(replica.exit_code().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_never_recovers_ends_the_process_and_says_which() {
    let vars = vars("task::saga-deadlines=panic(boom)", &[("TASK_GIVE_UP_AFTER", "2s")]).await;
    let (code, _, log) = run(&["serve", "--arm-fault-points"], &vars).await;
    assert_eq!(code, 1, "{log}");
    let last = log.lines().last().unwrap_or_default();
    assert!(last.contains("saga-deadlines has been failing for"), "{last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_variable_alone_makes_nothing_fail() {
    let fail: Vec<String> = TASKS.iter().map(|task| format!("task::{task}=return")).collect();
    let mut replica = Replica::serve(&vars(&fail.join(";"), &[]).await).await;
    let ready = format!("{}/auth/health/ready", replica.http);
    eventually("it is ready", || async { (get(&ready).await?.0 == 200).then_some(()) }).await;
    assert!(replica.logged("a task failed").is_empty());
    replica.terminate();
    assert_eq!(replica.exit_code().await, Some(0));
}
