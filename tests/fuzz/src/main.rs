//! The parsers of outside bytes under libFuzzer: one binary, whose target `FUZZ_TARGET` names. `run` starts it.
//!
//! An input must not make a target panic, nor cost more than [`MOST_CPU`] or [`MOST_ALLOCATED`]. Beyond that each
//! target states what holds of whatever its parser accepts, and of whatever comes of it in answers and log lines.
//!
//! Inputs are text where the real ones are, so that a finding can be read. Their parts are separated by the byte 0x1e.
#![no_main]

mod http;
mod log;
mod parts;
mod service;
mod targets;

use std::{alloc::System, env, fs, path::Path, sync::OnceLock, time::Duration};

use cap::Cap;
use libfuzzer_sys::fuzz_target;

use targets::Target;

/// Of one input, in an unoptimised build.
const MOST_CPU: Duration = Duration::from_secs(2);
/// Of one input, in all, whether or not it is freed again.
const MOST_ALLOCATED: usize = 64 << 20;
/// More than any text may have of a log line, an error or a column with a bound.
const LONG: usize = 6000;
/// Of the whole process at one moment: an allocation beyond it fails, and the process with it.
const MOST_MEMORY: usize = 512 << 20;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, MOST_MEMORY);
static TARGET: OnceLock<&Target> = OnceLock::new();

fuzz_target!(init: begin(), |input: &[u8]| attack(input));

/// Finds the target, writes its seeds where `FUZZ_SEEDS` says, and tries them once: what is made on first use is made
/// then, and not charged to an input.
fn begin() {
    let name = env::var("FUZZ_TARGET").unwrap_or_default();
    let Some(target) = targets::ALL.iter().find(|target| target.name == name) else {
        let names: Vec<_> = targets::ALL.iter().map(|target| target.name).collect();
        println!("{}", names.join("\n"));
        std::process::exit(0);
    };
    // The configuration is read before there is a log.
    if name != "config" {
        log::install();
    }
    let seeds = env::var_os("FUZZ_SEEDS");
    for (number, seed) in target.seeds.iter().enumerate() {
        if let Some(folder) = &seeds {
            fs::write(Path::new(folder).join(format!("seed-{number:02}")), seed).expect("the seeds' folder");
        }
        (target.run)(seed);
    }
    let _ = TARGET.set(target);
    // Mutation makes inputs longer only by and by.
    target.seeds.iter().flat_map(|seed| stretched(seed)).for_each(|input| attack(&input));
}

/// The seed with one of its words much longer, for each word.
fn stretched(seed: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let begins = |at: &usize| {
        let before = at.checked_sub(1).map(|before| seed[before]);
        seed[*at].is_ascii_alphanumeric() && !before.is_some_and(|before| before.is_ascii_alphanumeric())
    };
    (0..seed.len()).filter(begins).map(|at| [&seed[..at], &[b'7'; LONG], &seed[at..]].concat())
}

fn attack(input: &[u8]) {
    let target = TARGET.get().expect("begin() comes first");
    let (cpu, allocated) = (cpu_time(), MEMORY.total_allocated());
    (target.run)(input);
    let (cpu, allocated) = (cpu_time() - cpu, MEMORY.total_allocated() - allocated);
    assert!(cpu <= MOST_CPU, "the input costs {cpu:?} of processor time");
    assert!(allocated <= MOST_ALLOCATED, "the input allocates {allocated} bytes");
}

/// Of all threads of this process: passwords are hashed on another one.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists, and `time` is there to be written to.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(failed, 0, "no clock of processor time");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
