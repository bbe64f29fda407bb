//! Reads PEM files into rustls configurations.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};

use super::{Leaf, Material, TlsError};

/// The three files that make an identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Our certificate, then the intermediate ones.
    pub certificate: PathBuf,
    /// Its key; a secret.
    pub key: PathBuf,
    /// The CA's certificate; two while the CA is being replaced.
    pub authorities: PathBuf,
}

/// Identity and age of the three files. Mounted Secrets are replaced by a change of a symbolic
/// link, which shows as another inode here.
pub(super) type Stamp = [Option<(u64, u64, u64, i64, i64)>; 3];

impl Files {
    /// The layout of mounted Secrets and ConfigMaps: `tls.crt` and `tls.key`, and `ca.crt`.
    pub fn in_dirs(tls: impl AsRef<Path>, ca: impl AsRef<Path>) -> Self {
        Self {
            certificate: tls.as_ref().join("tls.crt"),
            key: tls.as_ref().join("tls.key"),
            authorities: ca.as_ref().join("ca.crt"),
        }
    }

    /// Returns identity and age of each file; none for a file that does not exist.
    pub(super) fn stamp(&self) -> Stamp {
        [&self.certificate, &self.key, &self.authorities].map(|path| {
            let meta = fs::metadata(path).ok()?;
            let changed = meta
                .ctime()
                .wrapping_mul(1_000_000_000)
                .wrapping_add(meta.ctime_nsec());
            let written = meta
                .mtime()
                .wrapping_mul(1_000_000_000)
                .wrapping_add(meta.mtime_nsec());
            Some((meta.dev(), meta.ino(), meta.len(), written, changed))
        })
    }

    pub(super) fn read(&self) -> Result<Material, TlsError> {
        let chain = certificates(&self.certificate)?;
        let roots = self.roots()?;
        let key = self.key()?;
        let leaf = Leaf::parse(&chain[0]).map_err(|error| content(&self.certificate, error))?;
        let provider = Arc::new(ring::default_provider());
        let verifier = self.verifier(provider.clone(), roots.clone())?;
        // Validity at the present time is a separate question, which the certificate's own dates
        // answer.
        let start = UnixTime::since_unix_epoch(Duration::from_secs(
            u64::try_from(leaf.not_before).unwrap_or(0),
        ));
        let is_trusted = verifier
            .verify_client_cert(&chain[0], &chain[1..], start)
            .is_ok();
        let server = self.server(provider.clone(), verifier, chain.clone(), key.clone_key())?;
        let client = self.client(provider, roots, chain, key)?;
        Ok(Material {
            server: Arc::new(server),
            client: Arc::new(client),
            leaf,
            is_trusted,
        })
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        let pem = read(&self.key)?;
        // The cause is left out: nothing of a key's file may reach a log.
        PrivateKeyDer::from_pem_slice(&pem)
            .map_err(|_| content(&self.key, "must hold one private key in PEM"))
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.authorities)? {
            roots
                .add(certificate)
                .map_err(|error| content(&self.authorities, error))?;
        }
        Ok(Arc::new(roots))
    }

    fn verifier(
        &self,
        provider: Arc<CryptoProvider>,
        roots: Arc<RootCertStore>,
    ) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        WebPkiClientVerifier::builder_with_provider(roots, provider)
            .build()
            .map_err(|error| content(&self.authorities, error))
    }

    fn server(
        &self,
        provider: Arc<CryptoProvider>,
        verifier: Arc<dyn ClientCertVerifier>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<ServerConfig, TlsError> {
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| content(&self.certificate, error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| content(&self.certificate, error))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would skip the check of a certificate that has expired since.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    fn client(
        &self,
        provider: Arc<CryptoProvider>,
        roots: Arc<RootCertStore>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<ClientConfig, TlsError> {
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| content(&self.certificate, error))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|error| content(&self.certificate, error))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

/// Reads at least one certificate.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(path)?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| content(path, error))?;
    if found.is_empty() {
        return Err(content(path, "must hold at least one certificate in PEM"));
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}

fn content(path: &Path, rule: impl ToString) -> TlsError {
    TlsError::Content {
        path: path.to_owned(),
        rule: rule.to_string(),
    }
}
