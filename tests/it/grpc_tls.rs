//! gRPC over TLS, and clients that are known by their certificates.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use auth_proto::auth::v1::{
    GetAccountRequest, ValidateAccessTokenRequest, account_service_client::AccountServiceClient,
    token_service_client::TokenServiceClient,
};
use auth_service::app::Role;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tonic::{
    Code,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::support::{TestService, service::Wishes};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).expect("names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    /// Certificate and key.
    fn issue(&self) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("names");
        (params.signed_by(&key, &self.0).expect("a certificate").pem(), key.serialize_pem())
    }
}

fn file(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, text).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("private");
    path.display().to_string()
}

async fn service(vars: Vec<(&'static str, String)>) -> TestService {
    let roles = Some(vec![Role::Http, Role::Grpc]);
    TestService::with(Wishes { roles, vars, no_topics: true, ..Wishes::default() }).await
}

fn channel(service: &TestService, trusted: &Authority, identity: Option<(String, String)>) -> Channel {
    let mut tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(trusted.0.pem())).domain_name("localhost");
    if let Some((certificate, key)) = identity {
        tls = tls.identity(Identity::from_pem(certificate, key));
    }
    let url = service.grpc.replace("http://", "https://");
    Endpoint::from_shared(url).expect("an address").tls_config(tls).expect("TLS").connect_lazy()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_the_configured_authority_is_a_callers_credential_and_no_other_gets_in() {
    let (servers, clients, strangers) = (Authority::new(), Authority::new(), Authority::new());
    let dir = tempfile::tempdir().unwrap();
    let (certificate, key) = servers.issue();
    let service = service(vec![
        ("GRPC_TLS_CERT", file(dir.path(), "cert.pem", &certificate)),
        ("GRPC_TLS_KEY", file(dir.path(), "key.pem", &key)),
        ("GRPC_TLS_CLIENT_CA", file(dir.path(), "ca.pem", &clients.0.pem())),
        ("GRPC_HOST", "127.0.0.1".to_owned()),
    ])
    .await;
    let user_id = service.registered("ada").await["id"].as_i64().unwrap();
    let request = GetAccountRequest { user_id };

    let known = channel(&service, &servers, Some(clients.issue()));
    let account = AccountServiceClient::new(known).get_account(request).await.unwrap().into_inner();
    assert_eq!(account.username, "ada");

    let plain = Endpoint::from_shared(service.grpc.clone()).unwrap().connect_lazy();
    for (what, channel) in [
        ("no certificate", channel(&service, &servers, None)),
        ("a stranger's", channel(&service, &servers, Some(strangers.issue()))),
        ("no TLS", plain),
    ] {
        assert!(AccountServiceClient::new(channel).get_account(request).await.is_err(), "{what}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tls_alone_callers_still_need_a_token() {
    let servers = Authority::new();
    let dir = tempfile::tempdir().unwrap();
    let (certificate, key) = servers.issue();
    let service = service(vec![
        ("GRPC_TLS_CERT", file(dir.path(), "cert.pem", &certificate)),
        ("GRPC_TLS_KEY", file(dir.path(), "key.pem", &key)),
        ("GRPC_HOST", "127.0.0.1".to_owned()),
    ])
    .await;
    let channel = channel(&service, &servers, Some(servers.issue()));
    let status = AccountServiceClient::new(channel.clone()).get_account(GetAccountRequest { user_id: 1 }).await;
    assert_eq!(status.unwrap_err().code(), Code::Unauthenticated);
    let request = ValidateAccessTokenRequest { access_token: "a.b.c".to_owned() };
    let status = TokenServiceClient::new(channel).validate_access_token(request).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(status.metadata().get("error-code").unwrap(), "TOKEN_INVALID");
    service.stop().await;
}
