//! `auth-service outbox …`: the operator's work on the outbox, from a shell.

mod moment;
mod text;
mod verify;

use std::process::ExitCode;

use clap::Subcommand;

use crate::cli::Failure;
pub use verify::VerifyArgs;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum OutboxCommand {
    /// Hold what the archive says of a time against what stands in Kafka
    ///
    /// For each archived row of the window: the message is there once, at its offset, byte for byte, in
    /// the order of its key. And each message of ours that stands there is known to the database: after a
    /// restore, those that the database forgot are listed as unmatched. The report holds no payloads. Needs the database (SELECT is enough) and Kafka; writes nothing.
    ///
    /// Exit code: 0 all of it is proven; 1 something contradicts; 2 the configuration or the command line
    /// is wrong; 3 nothing contradicts, but not everything can be proven (Kafka or the archive no longer
    /// has it, a topic is compacted, partitions were added); 4 it could not be carried out (database or Kafka away).
    Verify(VerifyArgs),
}

impl OutboxCommand {
    /// Does it.
    pub(crate) async fn run(self) -> Result<ExitCode, Failure> {
        match self {
            OutboxCommand::Verify(args) => verify::run(args).await,
        }
    }
}
