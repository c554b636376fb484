//! Compiles the contracts with protox (no protoc on the machine) and hands the same descriptor
//! set to the server reflection.

use std::{env, fs, path::PathBuf};

use prost::Message;

const CONTRACTS: [&str; 5] = [
    "auth/v1/token_service.proto",
    "auth/v1/account_service.proto",
    "user/v1/user_service.proto",
    "legacy/token.proto",
    "legacy/auth_user.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for contract in CONTRACTS {
        println!("cargo:rerun-if-changed={contract}");
    }
    let descriptors = protox::compile(CONTRACTS, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
