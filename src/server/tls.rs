//! TLS of a listener, by rustls.

use std::sync::Arc;

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use secrecy::ExposeSecret;
use tokio_rustls::TlsAcceptor;

use crate::config::GrpcTls;

/// In a request's extensions: the client has shown a certificate of the configured authority.
#[derive(Debug, Clone, Copy)]
pub struct ClientCertificate;

/// Certificate and key, and whose clients are let in. The error never shows a key.
pub fn acceptor(tls: &GrpcTls) -> Result<TlsAcceptor, String> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(tls.certificate.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| format!("the certificate can't be read: {error}"))?;
    // The parser's own words may quote a part of the key.
    let key = PrivateKeyDer::from_pem_slice(tls.key.expose_secret().as_bytes())
        .map_err(|_| "the private key can't be read".to_owned())?;
    let builder = ServerConfig::builder();
    let builder = match &tls.client_ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_slice_iter(ca.as_bytes()) {
                let certificate = certificate.map_err(|error| format!("the client CA can't be read: {error}"))?;
                roots.add(certificate).map_err(|error| format!("the client CA can't be used: {error}"))?;
            }
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build();
            builder
                .with_client_cert_verifier(verifier.map_err(|error| format!("the client CA can't be used: {error}"))?)
        }
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|error| format!("certificate and key can't be used together: {error}"))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
