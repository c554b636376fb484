//! Who may call `AccountService`: the bearer of a token out of `GRPC_CALLER_TOKENS`, or whoever has
//! shown a certificate of `GRPC_TLS_CLIENT_CA` in the handshake.

use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use subtle::ConstantTimeEq;
use tonic::{Request, Status, metadata::MetadataMap, service::Interceptor};

use super::status::Refusal;
use crate::config::{CallerToken, GrpcConfig};
use crate::server::tls::ClientCertificate;

const NOT_CONFIGURED: &str = "this service is for callers with credentials, and none are configured: set \
     GRPC_CALLER_TOKENS to name:sha256 of a token, or GRPC_TLS_CLIENT_CA";
const NO_CREDENTIALS: &str = "this service is for callers with credentials: send \"authorization: Bearer <token>\" \
     with a token that GRPC_CALLER_TOKENS names, or a client certificate";
const UNKNOWN_TOKEN: &str = "the token is not one that GRPC_CALLER_TOKENS names";

/// A caller that was let in.
#[derive(Debug, Clone)]
pub struct Caller(Arc<str>);

impl Caller {
    /// For the log.
    pub fn name(&self) -> &str {
        &self.0
    }
}

/// The door.
#[derive(Debug, Clone)]
pub struct Callers {
    tokens: Arc<[CallerToken]>,
    by_certificate: bool,
}

impl Callers {
    /// As configured.
    pub fn new(config: &GrpcConfig) -> Self {
        Self {
            tokens: config.caller_tokens.clone().into(),
            by_certificate: config.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some()),
        }
    }

    fn identify(&self, metadata: &MetadataMap, has_certificate: bool) -> Result<Caller, Refusal> {
        if let Some(token) = bearer(metadata) {
            return self.named(token).ok_or(Refusal::Caller(UNKNOWN_TOKEN));
        }
        if self.by_certificate && has_certificate {
            return Ok(Caller("client certificate".into()));
        }
        Err(Refusal::Caller(match self.tokens.is_empty() && !self.by_certificate {
            true => NOT_CONFIGURED,
            false => NO_CREDENTIALS,
        }))
    }

    /// All of them are compared, each in the same time, so that nothing is learnt from a miss.
    fn named(&self, token: &str) -> Option<Caller> {
        let presented = digest(&SHA256, token.as_bytes());
        let mut found = None;
        for token in self.tokens.iter() {
            if bool::from(token.sha256.ct_eq(presented.as_ref())) {
                found = Some(token);
            }
        }
        found.map(|token| Caller(token.name.as_str().into()))
    }
}

impl Interceptor for Callers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let has_certificate = request.extensions().get::<ClientCertificate>().is_some();
        let caller = self.identify(request.metadata(), has_certificate)?;
        request.extensions_mut().insert(caller);
        Ok(request)
    }
}

fn bearer(metadata: &MetadataMap) -> Option<&str> {
    let (scheme, token) = metadata.get("authorization")?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn callers(tokens: &[(&str, &str)], by_certificate: bool) -> Callers {
        let tokens = tokens.iter().map(|(name, token)| CallerToken {
            name: (*name).to_owned(),
            sha256: digest(&SHA256, token.as_bytes()).as_ref().try_into().expect("32 bytes"),
        });
        Callers { tokens: tokens.collect(), by_certificate }
    }

    fn answer(callers: &Callers, authorization: Option<&'static str>, has_certificate: bool) -> Result<String, String> {
        let mut metadata = MetadataMap::new();
        if let Some(value) = authorization {
            metadata.insert("authorization", value.parse().expect("ASCII"));
        }
        match callers.identify(&metadata, has_certificate) {
            Ok(caller) => Ok(caller.name().to_owned()),
            Err(refusal) => Err(Status::from(refusal).message().to_owned()),
        }
    }

    #[test]
    fn a_token_names_its_caller_and_no_other_token_does() {
        let callers = callers(&[("mail", "m-secret"), ("gateway", "g-secret")], false);
        assert_eq!(answer(&callers, Some("Bearer g-secret"), false).as_deref(), Ok("gateway"));
        assert_eq!(answer(&callers, Some("bearer m-secret"), false).as_deref(), Ok("mail"));
        for bad in ["Bearer", "Bearer ", "Basic g-secret", "Bearer g-secre", "g-secret"] {
            assert!(answer(&callers, Some(bad), false).is_err(), "{bad}");
        }
        assert!(answer(&callers, None, true).is_err(), "certificates count only where a CA is configured");
    }

    #[test]
    fn a_certificate_is_enough_where_a_ca_is_configured() {
        let callers = callers(&[], true);
        assert_eq!(answer(&callers, None, true).as_deref(), Ok("client certificate"));
        assert!(answer(&callers, None, false).is_err());
    }

    #[test]
    fn without_any_credentials_configured_the_answer_says_how() {
        let told = answer(&callers(&[], false), None, false).expect_err("refused");
        assert!(told.contains("GRPC_CALLER_TOKENS") && told.contains("GRPC_TLS_CLIENT_CA"), "{told}");
    }
}
