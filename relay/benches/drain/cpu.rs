//! Who uses the processors.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

/// Kernel clock ticks a second, as `/proc` counts processor time on Linux.
const TICKS: f64 = 100.0;

/// Processor time of the moments it ran.
#[derive(Default)]
pub struct Clock {
    ran: Duration,
    used: Used,
}

/// Seconds of processor time.
#[derive(Clone, Copy, Default)]
struct Used {
    postgres: f64,
    kafka: f64,
    relay: f64,
}

impl Clock {
    /// Lets it run while `work` is done.
    pub async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let (since, before) = (Instant::now(), Used::now());
        let done = work.await;
        let now = Used::now();
        self.ran += since.elapsed();
        self.used.postgres += now.postgres - before.postgres;
        self.used.kafka += now.kafka - before.kafka;
        self.used.relay += now.relay - before.relay;
        done
    }

    /// How much of it an event took, and how busy the machine was.
    pub fn per_event(&self, events: usize) -> String {
        let Used { postgres, kafka, relay } = self.used;
        let micros = |seconds: f64| seconds * 1e6 / events as f64;
        let busy = (postgres + kafka + relay) / self.ran.as_secs_f64();
        let cores = thread::available_parallelism().map_or(0, usize::from);
        format!(
            "processor time of an event: PostgreSQL {:.0} µs, relay {:.0} µs, Kafka {:.0} µs; {busy:.1} of {cores} cores busy",
            micros(postgres),
            micros(relay),
            micros(kafka),
        )
    }
}

impl Used {
    fn now() -> Self {
        let mut used = Self::default();
        let own = std::process::id().to_string();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
            let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else { continue };
            let fields: Vec<&str> = stat[close + 1..].split_whitespace().collect();
            let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
            // Of the process itself, user and system; a backend that has ended counts with its parent.
            let seconds = (11..=14).map(ticks).sum::<f64>() / TICKS;
            match &stat[open + 1..close] {
                "postgres" => used.postgres += seconds,
                "java" => used.kafka += seconds,
                _ if entry.file_name().to_string_lossy() == own => used.relay += seconds,
                _ => {}
            }
        }
        used
    }
}
