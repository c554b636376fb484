//! The targets, a file each.

mod admin;
mod config;
mod domain;
mod grpc;
mod headers;
mod keys;
mod relay_records;
mod rest;
mod saga_reply;
mod stored_hash;
mod tokens;
mod user_command;
mod wire;

/// A parser, or several that read the same bytes.
pub struct Target {
    /// As `FUZZ_TARGET` names it.
    pub name: &'static str,
    /// Inputs to begin with, one of each kind.
    pub seeds: &'static [&'static [u8]],
    /// Panics when something does not hold.
    pub run: fn(&[u8]),
}

/// All of them.
pub const ALL: [Target; 13] = [
    admin::TARGET,
    config::TARGET,
    domain::TARGET,
    grpc::TARGET,
    headers::TARGET,
    keys::TARGET,
    relay_records::TARGET,
    rest::TARGET,
    saga_reply::TARGET,
    stored_hash::TARGET,
    tokens::TARGET,
    user_command::TARGET,
    wire::TARGET,
];
