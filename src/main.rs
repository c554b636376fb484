//! The one binary. Everything it can do is in [`auth_service::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    auth_service::cli::run()
}
