//! Harm to a cluster of three brokers with Kafka's own timeouts: three copies of everything, of which two must be there.
//!
//! Each scenario has two fleets under the same harm, one that fences and one that doesn't, and a plain producer beside
//! them, which says what any client had to wait for.

use std::time::{Duration, Instant};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Scenario, scenario};
use crate::{
    checker::{Expected, Verdict, judge},
    cluster::{Cluster, NODES, cluster},
    control::Control,
    fleet::{Fleet, Wishes},
    keeper::Keeper,
    node,
    protocol::Coordinated,
    proxy::Wire,
    stage::Stage,
};

const PATIENCE: Duration = Duration::from_secs(120);
const KEYS: usize = 6;
const PAUSE: Duration = Duration::from_millis(80);
/// In how many topics `many_topics` writes.
const MANY: usize = 20;

pub fn scenarios() -> Vec<Scenario> {
    let all = vec![
        scenario!("cluster: the leader killed", "kill -9; noticed after nine seconds", leader_killed),
        scenario!("cluster: the leader frozen and thawed", "SIGSTOP past its session", leader_frozen).rare(),
        scenario!("cluster: all brokers restarted in a row", "a rolling update", rolling).rare(),
        scenario!("cluster: two brokers away at once", "below the copies that must be there", two_away).rare(),
        scenario!("cluster: leadership moved", "replicas in another order, and an election", moved).rare(),
        scenario!("cluster: partitions added", "half of the keys move", partitions_added).rare(),
        scenario!("cluster: a topic deleted and made again at once", "three times", made_again).rare(),
        scenario!("cluster: many topics made and written to at once", "no leader knows its partition yet", many_topics),
        scenario!("cluster: the coordinators killed", "of the transactions, then of the group", coordinators_killed)
            .rare(),
        scenario!("cluster: the controller killed", "kill -9 of the active one", controller_killed).rare(),
        scenario!("cluster: a broker cut off from its clients", "its peers still reach it", cut_off).rare(),
        scenario!("cluster: every broker killed in a row", "each by kill -9, and back in sync", each_killed).rare(),
    ];
    all.into_iter().map(Scenario::on_cluster).collect()
}

/// What a scenario of this file plays on.
struct Trio {
    plain: (Fleet, Keeper),
    fenced: (Fleet, Keeper),
    control: Control,
    control_topic: String,
}

impl Trio {
    async fn start(stage: &Stage, cluster: &Cluster, more_topics: usize) -> Self {
        let control_topic = format!("control{}", Uuid::new_v4().simple());
        node::create_topics(&cluster.brokers(), std::slice::from_ref(&control_topic), &[]).await;
        let one = async |fenced| {
            // As in production.
            let vars = [("RELAY_LEASE", "10s"), ("SAGA_STEP_TIMEOUT", "20s"), ("DB_ACQUIRE_TIMEOUT", "10s")];
            let vars = vars.map(|(name, value)| (name, value.to_owned())).to_vec();
            let brokers = Some(cluster.brokers());
            let fleet = Fleet::new(stage, Wishes { brokers, vars, fenced, more_topics, ..Wishes::default() }).await;
            let keeper = fleet.all_roles().await;
            (fleet, keeper)
        };
        let (plain, fenced) = tokio::join!(one(false), one(true));
        let control = Control::start(&cluster.brokers(), &control_topic);
        Self { plain, fenced, control, control_topic }
    }

    fn fleets(&self) -> [&Fleet; 2] {
        [&self.plain.0, &self.fenced.0]
    }

    fn disturbed(&self) {
        self.fleets().into_iter().for_each(Fleet::disturbed);
    }

    /// Events and users all the time, from a second before the harm until a second after it.
    async fn under_load(&self, harm: impl Future<Output = ()>) {
        self.under_load_of("key", harm).await;
    }

    /// With keys of such names.
    async fn under_load_of(&self, keys: &str, harm: impl Future<Output = ()>) {
        let enough = CancellationToken::new();
        let keys: Vec<_> = (0..KEYS).map(|key| format!("{keys}{key}")).collect();
        let load = async |(fleet, keeper): &(Fleet, Keeper)| fleet.load_until(keeper, &keys, PAUSE, &enough).await;
        let harm = async {
            sleep(Duration::from_secs(1)).await;
            harm.await;
            sleep(Duration::from_secs(1)).await;
            enough.cancel();
        };
        tokio::join!(load(&self.plain), load(&self.fenced), harm);
    }

    async fn finish(self, cluster: &Cluster) -> Verdict {
        let since = Instant::now();
        tokio::join!(self.plain.0.settle(PATIENCE), self.fenced.0.settle(PATIENCE));
        let settled = since.elapsed();
        let control = self.control.end().await;
        let waits = [self.plain.0.longest_wait().await, self.fenced.0.longest_wait().await];
        let mut topics = vec![self.control_topic];
        topics.extend(self.plain.0.topics().into_iter().chain(self.fenced.0.topics()));
        let judged = async |(fleet, keeper)| judge(fleet, vec![keeper], Expected::default()).await;
        let (mut verdict, fenced) = tokio::join!(judged(self.plain), judged(self.fenced));
        verdict.measured.push(format!(
            "longest wait {:.1} s, fenced {:.1} s, {control}; copies {}, fenced {}; at rest {:.1} s after",
            waits[0].as_secs_f64(),
            waits[1].as_secs_f64(),
            verdict.duplicates,
            fenced.duplicates,
            settled.as_secs_f64(),
        ));
        verdict.add(&fenced);
        verdict.findings.extend(fenced.findings.into_iter().map(|finding| format!("fenced: {finding}")));
        // Its successors start and stop brokers that need not know of them.
        let names: Vec<&str> = topics.iter().map(String::as_str).collect();
        node::delete_topics(&cluster.brokers(), &names).await;
        verdict
    }
}

/// `kill -9`, until others lead what it led, then started on its data.
async fn kill_and_start(cluster: &mut Cluster, trio: &Trio, node: usize) {
    trio.disturbed();
    cluster.kill(&[node]).await;
    cluster.until_led().await;
    sleep(Duration::from_secs(1)).await;
    cluster.start_again(&[node]).await;
    cluster.until_in_sync().await;
}

async fn leader_killed(stage: Stage) -> Verdict {
    let mut cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, 0).await;
    let leader = cluster.leader(&trio.plain.0.topic("load"), 0).await;
    trio.under_load(kill_and_start(&mut cluster, &trio, leader)).await;
    trio.finish(&cluster).await
}

async fn each_killed(stage: Stage) -> Verdict {
    let mut cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, 0).await;
    trio.under_load(async {
        for node in 1..=NODES {
            kill_and_start(&mut cluster, &trio, node).await;
        }
    })
    .await;
    trio.finish(&cluster).await
}

async fn leader_frozen(mut stage: Stage) -> Verdict {
    let mut cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, 0).await;
    let leader = cluster.leader(&trio.plain.0.topic("load"), 0).await;
    let length = Duration::from_secs(if stage.full { 40 } else { stage.roll(15, 20) });
    trio.under_load(async {
        (0..2).for_each(|_| trio.disturbed());
        cluster.freeze(&[leader]).await;
        sleep(length).await;
        cluster.thaw(&[leader]).await;
        cluster.until_in_sync().await;
    })
    .await;
    trio.finish(&cluster).await
}

async fn rolling(stage: Stage) -> Verdict {
    let mut cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, 0).await;
    trio.under_load(async {
        for node in 1..=NODES {
            trio.disturbed();
            cluster.stop(&[node]).await;
            cluster.start_again(&[node]).await;
            cluster.until_in_sync().await;
        }
    })
    .await;
    trio.finish(&cluster).await
}

/// With two of three, the controllers have no majority either.
async fn two_away(mut stage: Stage) -> Verdict {
    let mut cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, 0).await;
    let first = stage.roll(1, NODES as u64) as usize;
    let second = first % NODES + 1;
    let length = stage.seconds(6, 60);
    trio.under_load(async {
        (0..2).for_each(|_| trio.disturbed());
        cluster.kill(&[first, second]).await;
        sleep(length).await;
        cluster.start_again(&[second]).await;
        cluster.start_again(&[first]).await;
        cluster.until_in_sync().await;
    })
    .await;
    trio.finish(&cluster).await
}

async fn moved(stage: Stage) -> Verdict {
    let cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, 0).await;
    trio.under_load(async {
        for turn in 1..=stage.many(3) {
            trio.disturbed();
            for fleet in trio.fleets() {
                cluster.move_leaders(&fleet.topic("load"), 4, turn).await;
            }
            cluster.move_leaders("__transaction_state", 1, turn).await;
            cluster.until_in_sync().await;
        }
    })
    .await;
    trio.finish(&cluster).await
}

/// From then on a key's events may go to another partition: those of before stay, and none follows them there.
async fn partitions_added(stage: Stage) -> Verdict {
    let cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, 0).await;
    let moved_keys = "select count(distinct key) from outbox_archive where partition >= 4";
    trio.under_load(async {
        trio.disturbed();
        for fleet in trio.fleets() {
            // Twice as many: a key that moves goes to a partition of a higher number, as the checker reads them.
            cluster.add_partitions(&fleet.topic("load"), 8).await;
        }
        for fleet in trio.fleets() {
            fleet.until_at_least(moved_keys, 2, PATIENCE).await;
        }
    })
    .await;
    trio.finish(&cluster).await
}

/// What was in the topic is gone with it, by whoever deleted it: only what is committed when it is there again is
/// looked for.
async fn made_again(stage: Stage) -> Verdict {
    let cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, 0).await;
    let mut longest = Duration::ZERO;
    for turn in 0..stage.many(3) {
        for fleet in trio.fleets() {
            let topic = fleet.topic("load");
            // The newer the leader's epoch, the less a client believes in the first one of the new topic.
            cluster.move_leaders(&topic, 4, turn + 1).await;
            // Keys of before go with the topic, so those of each turn are others.
            fleet.commit_events_of(format!("before{turn}"), 10, 200).await;
            fleet.until_count("select count(*) from outbox", 0, PATIENCE).await;
            longest = longest.max(fleet.longest_wait().await);
            fleet.forget_events().await;
            fleet.disturbed();
            cluster.make_again(&topic).await;
        }
        trio.under_load_of(&format!("turn{turn}key"), async {}).await;
    }
    let mut verdict = trio.finish(&cluster).await;
    verdict.measured.push(format!("longest wait of earlier turns {:.1} s", longest.as_secs_f64()));
    verdict
}

/// Events wait for topics that are made all at once, and each is written to while it comes into being.
async fn many_topics(stage: Stage) -> Verdict {
    let cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, MANY).await;
    trio.disturbed();
    trio.under_load(async {
        for fleet in trio.fleets() {
            node::create_topics(&fleet.brokers, &fleet.more_topics(), &[]).await;
            for _ in 0..5 {
                fleet.commit_to_more_topics().await;
            }
        }
    })
    .await;
    trio.finish(&cluster).await
}

async fn coordinators_killed(stage: Stage) -> Verdict {
    let mut cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, 0).await;
    trio.under_load(async {
        // There is one partition of transactions: any name will do.
        let node = cluster.coordinator(Coordinated::Transaction, "any").await;
        kill_and_start(&mut cluster, &trio, node).await;
        let node = cluster.coordinator(Coordinated::Group, &trio.plain.0.topic("auth")).await;
        kill_and_start(&mut cluster, &trio, node).await;
    })
    .await;
    trio.finish(&cluster).await
}

async fn controller_killed(stage: Stage) -> Verdict {
    let mut cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, 0).await;
    let controller = cluster.controller().await;
    trio.under_load(kill_and_start(&mut cluster, &trio, controller)).await;
    trio.finish(&cluster).await
}

/// It goes on leading its partitions, and nobody can write to them.
async fn cut_off(stage: Stage) -> Verdict {
    let cluster = cluster().await;
    let trio = Trio::start(&stage, &cluster, 0).await;
    let leader = cluster.leader(&trio.plain.0.topic("load"), 0).await;
    let length = stage.seconds(15, 60);
    trio.under_load(async {
        (0..2).for_each(|_| trio.disturbed());
        cluster.wires[leader - 1].set_for(Wire::Silent, length).await;
    })
    .await;
    trio.finish(&cluster).await
}
