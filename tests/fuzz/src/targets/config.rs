//! `.env` and the environment: what is wrong is said without any value, what is right is shown without secrets.

use auth_service::{
    config::{Config, Profile},
    fuzzing,
};

use super::Target;
use crate::{http::CANARY, service::variables};

/// An `.env` file. Its first byte says whether it stands above good variables (`+`), or alone.
pub const TARGET: Target = Target {
    name: "config",
    seeds: &[
        b"+ACCESS_TOKEN_EXPIRES_IN=15m\nREFRESH_TOKEN_EXPIRES_IN=604800\nSALT_ROUNDS=10\nDB_DIALECT=postgres\n",
        b"+DATABASE_URL=postgres://auth:c4nary@db:5432/auth?sslmode=require\nKAFKA_BROKERS=kafka-1:9092, kafka-2\nUSER_SERVICE_GRPC_URL=user-service:50052\nAUTH_SERVICE_GRPC_URL=0.0.0.0:50055\n",
        b"\xef\xbb\xbfAPP_NAME=My App\nCRON=*/5 * * * *\nLOG_DIR=C:\\logs\nX=sec#ret\nY=it's John's\nexport DB_PASSWORD='c4nary $HOME'\nnothing\nDB_PASSWORD=\"two\nlines\" # c4nary\nK=`-----BEGIN`\n",
        b"+KAFKA_BROKERS=,\nPORT=c4nary\nGRPC_PORT=4003\nADMIN_PORT=65536\nRUST_LOG=auth_service=loud\n",
        b"+ADMIN_TOKENS=ops:read,operate:c4nary,eve:admin:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08\nGRPC_CALLER_TOKENS=c4nary\nPASSWORD_PEPPER=c4nary\n",
        b"+KAFKA_SECURITY_PROTOCOL=sasl_ssl\nKAFKA_SASL_MECHANISM=SCRAM-SHA-512\nKAFKA_SASL_USERNAME=u\nKAFKA_SASL_PASSWORD=c4nary\n",
        b"+ACCESS_TOKEN_PRIVATE_KEY=c4nary\nREFRESH_TOKEN_PUBLIC_KEY=-----BEGIN PUBLIC KEY-----\\nc4nary\\n-----END PUBLIC KEY-----\nGRPC_TLS_KEY=-----BEGIN PRIVATE KEY-----c4nary\nGRPC_TLS_CERT=c4nary\n",
        b"DB_HOST=auth:c4nary@db\nDB_PORT=c4nary\nDB_DATABASE=auth\nDB_USERNAME=c4nary\nUSER_SERVICE_GRPC_URL=http://u:c4nary@host:1\nCORS_ORIGINS=https://u:c4nary@a.example,null\n",
        b"+RELAY_LEASE=30s\nSAGA_STEP_TIMEOUT=1h 30m\nARCHIVE_RETENTION=99999999999999999999d\nSHUTDOWN_DRAIN=0\nCOOKIE_SECURE=maybe\nLOG_FORMAT=JSON\nUSERNAME_RULES=unicode\nSAGA_SILENCE_POLICY=complete\n",
    ],
    run,
};

/// Values of these are shown by nothing.
const SECRETS: [&str; 9] = [
    "DATABASE_URL",
    "DB_PASSWORD",
    "KAFKA_SASL_PASSWORD",
    "PASSWORD_PEPPER",
    "ADMIN_TOKENS",
    "GRPC_CALLER_TOKENS",
    "ACCESS_TOKEN_PRIVATE_KEY",
    "REFRESH_TOKEN_PRIVATE_KEY",
    "GRPC_TLS_KEY",
];

fn run(input: &[u8]) {
    let (above, file) = match input.split_first() {
        Some((b'+', file)) => (true, file),
        _ => (false, input),
    };
    let (given, wrong) = fuzzing::dotenv(file);
    let names_it = given.keys().any(|name| name.contains(CANARY));
    for error in &wrong {
        assert!(error.variable.starts_with(".env") && error.to_string().len() < 1000 + file.len(), "{error}");
    }
    // A path is opened and read: a device has no end.
    if given.values().any(|value| ["/dev", "/proc", "/sys"].iter().any(|folder| value.contains(folder))) {
        return;
    }
    let mut all = if above { variables() } else { vec![] };
    let canary_elsewhere =
        given.iter().any(|(name, value)| value.contains(CANARY) && !SECRETS.contains(&name.as_str()));
    all.retain(|(name, _)| !given.contains_key(name));
    all.extend(given.into_iter().filter(|(name, _)| !name.ends_with("_FILE")));
    for profile in [Profile::Dev, Profile::Production] {
        match Config::from_vars(all.clone(), profile) {
            Ok(config) => {
                let shown = format!("{}\n{}\n{config:?}", config.summary(), config.warnings.join("\n"));
                assert!(canary_elsewhere || !shown.contains(CANARY), "a secret is shown: {shown}");
            }
            Err(errors) => {
                let said = errors.to_string();
                assert!(names_it || !said.contains(CANARY), "a value is in an error: {said}");
                assert!(errors.0.iter().all(|error| error.to_string().len() <= 1000), "{said}");
            }
        }
    }
}
