//! The connection limits fit what the process may open.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::Config;

/// Standard streams, sockets that listen, what the runtime and the resolver open.
const OWN: u64 = 40;
/// A Kafka client: connections to a few brokers and the pipes that wake its threads.
const KAFKA_CLIENT: u64 = 24;

/// Raises the process's own limit to what the system allows, and lowers the connection limits when they don't fit
/// even then: a process without descriptors answers nobody. Returns what to say about it.
pub fn fit_descriptors(config: &mut Config) -> Option<String> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let allowed = if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft };
    fit(config, allowed)
}

fn fit(config: &mut Config, allowed: u64) -> Option<String> {
    let producers = if config.relay.fencing { 2 * outbox_relay::FENCES } else { config.relay.workers } as u64;
    let pools = u64::from(config.database.pool_size) + u64::from(config.relay.pool_size);
    let reserved = OWN + pools + (producers + 1) * KAFKA_CLIENT;
    let listeners = [&mut config.http.listener, &mut config.grpc.listener, &mut config.admin.listener];
    let wanted: u64 = listeners.iter().map(|listener| listener.max_connections as u64).sum();
    // A connection that waits to be let in has a descriptor, too.
    let left = allowed.saturating_sub(reserved + listeners.len() as u64);
    if wanted <= left {
        return None;
    }
    let mut limits = vec![];
    for listener in listeners {
        listener.max_connections = ((listener.max_connections as u64 * left / wanted) as usize).max(1);
        limits.push(listener.max_connections.to_string());
    }
    Some(format!(
        "{allowed} open files are allowed (ulimit -n), {reserved} are kept for the database and Kafka: the limits of \
         connections are lowered to {} (HTTP_, GRPC_ and ADMIN_MAX_CONNECTIONS).",
        limits.join(", ")
    ))
}
