//! The node's certificate. The key is generated here and never leaves the node; the certificate is
//! requested through the API and renewed after two thirds of its lifetime.
//!
//! While a certificate is valid nothing here needs the API. A new key stays beside the one in use
//! until its certificate is issued, so that a crash at any point resumes there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use data_encoding::HEXLOWER;
use futures::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestSpec,
};
use kube::Api;
use kube::api::{ObjectMeta, PostParams, WatchEvent, WatchParams};
use margay_runtime::backoff::{Backoff, jitter};
use margay_runtime::ready::Gate;
use margay_runtime::tls::{Files, Leaf, Material, Tls, TlsError};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData,
};
use sha2::{Digest, Sha256};

use crate::requests::{self, bounded};

/// Signer of the operator.
const SIGNER: &str = "margay.io/node";
/// Key usages that the signer accepts, exactly these.
const USAGES: [&str; 3] = ["client auth", "digital signature", "server auth"];
/// Requested lifetime; the signer may grant less.
const LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// Interval of checking certificate and authorities: three `stat` calls.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Minimal and maximal delay between attempts.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Seconds after which a watch ends and is reopened.
const WATCH_SECONDS: u32 = 290;

/// Reason why there is no usable certificate.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file or directory cannot be used.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// A key or request cannot be generated.
    #[error("certificate request: {0}")]
    Make(#[from] rcgen::Error),
    /// The API request failed.
    #[error(
        "CertificateSigningRequest {name}: {source}; check that the agent's service account may \
         create and watch it"
    )]
    Api {
        /// Name of the object.
        name: String,
        /// Error of the API.
        source: Box<kube::Error>,
    },
    /// The API client cannot be created.
    #[error("API client: {0}")]
    Client(#[from] Box<kube::Error>),
    /// The signer refused.
    #[error(
        "CertificateSigningRequest {name} was {verdict}: {message}; see the log of margay-operator"
    )]
    Refused {
        /// Name of the object.
        name: String,
        /// `Denied` or `Failed`.
        verdict: String,
        /// Reason of the signer.
        message: String,
    },
    /// The request is not signed yet.
    #[error(
        "CertificateSigningRequest {name} is not signed yet; check that margay-operator is running"
    )]
    Waiting {
        /// Name of the object.
        name: String,
    },
    /// The certificate belongs to another node or is not valid now.
    #[error(
        "certificate of {name:?}, valid from {not_before} to {not_after} (Unix time), belongs to \
         another node or is not valid now; check the node's clock"
    )]
    Invalid {
        /// Common name of its subject.
        name: String,
        /// Start of its validity, Unix time in seconds.
        not_before: i64,
        /// End of its validity, Unix time in seconds.
        not_after: i64,
    },
    /// None of the current authorities has signed the certificate: they were replaced.
    #[error(
        "the certificate of {name:?} is signed by none of the authorities in {path}; a new one \
         is requested",
        path = authorities.display(),
    )]
    Untrusted {
        /// Common name of its subject.
        name: String,
        /// File of the authorities.
        authorities: PathBuf,
    },
    /// The certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Files of this node's key and certificate.
#[derive(Clone, Debug)]
pub struct Identity {
    node: String,
    folder: PathBuf,
    ca: PathBuf,
}

/// A key that is being certified, and the name of its request.
struct Pending {
    key: KeyPair,
    name: String,
}

impl Identity {
    /// The files `tls/tls.key` and `tls/tls.crt` in the state directory, and `ca.crt` in that of
    /// the authorities.
    pub fn new(node: &str, state: &Path, ca: &Path) -> Self {
        Self {
            node: node.to_owned(),
            folder: state.join("tls"),
            ca: ca.to_owned(),
        }
    }

    /// Common name of the certificate's subject.
    pub fn common_name(&self) -> String {
        format!("margay:node:{}", self.node)
    }

    /// Loads the certificate, requesting one if none is valid. Retries until it succeeds; the gate
    /// shows the reason meanwhile.
    pub async fn obtain(&self, gate: &Gate) -> Tls {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            let failed = match self.load() {
                Ok(tls) => return tls,
                Err(error) if self.is_recoverable(&error) => match self.request_certificate().await
                {
                    Ok(()) => match self.load() {
                        Ok(tls) => return tls,
                        Err(error) => error,
                    },
                    Err(error) => error,
                },
                Err(error) => error,
            };
            gate.close(failed.to_string());
            tracing::warn!(error = %failed, "no certificate yet");
            tokio::time::sleep(backoff.next(jitter())).await;
        }
    }

    /// Requests a new certificate after two thirds of the current one's lifetime, or when no
    /// authority vouches for it any more; never returns.
    pub async fn renew(&self, tls: &Tls) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            while self.is_due(&tls.current(), now()) {
                let Err(error) = self.request_certificate().await else {
                    backoff.reset();
                    break;
                };
                tracing::warn!(
                    %error,
                    "the certificate could not be renewed; it stays in use until it expires",
                );
                tokio::time::sleep(backoff.next(jitter())).await;
            }
        }
    }

    /// Loads key and certificate, if they are this node's, valid and signed by a known authority.
    fn load(&self) -> Result<Tls, IdentityError> {
        let tls = Tls::load(Files::in_dirs(&self.folder, &self.ca))?;
        let material = tls.current();
        let leaf = material.leaf.clone();
        if self.is_invalid(&leaf, now()) {
            return Err(IdentityError::Invalid {
                name: leaf.peer.common_name,
                not_before: leaf.not_before,
                not_after: leaf.not_after,
            });
        }
        if !material.is_trusted {
            return Err(IdentityError::Untrusted {
                name: leaf.peer.common_name,
                authorities: self.ca.join("ca.crt"),
            });
        }
        Ok(tls)
    }

    /// Whether a new certificate resolves the error: not if the authorities are missing.
    fn is_recoverable(&self, error: &IdentityError) -> bool {
        match error {
            IdentityError::Invalid { .. } | IdentityError::Untrusted { .. } => true,
            IdentityError::Tls(TlsError::Read { path, .. } | TlsError::Content { path, .. }) => {
                path.starts_with(&self.folder)
            }
            IdentityError::Tls(TlsError::Leaf(_)) => true,
            _ => false,
        }
    }

    /// Whether the certificate is another node's or not valid.
    fn is_invalid(&self, leaf: &Leaf, now: i64) -> bool {
        leaf.peer.common_name != self.common_name()
            || !(leaf.not_before..leaf.not_after).contains(&now)
    }

    /// Whether two thirds of its lifetime are over, or no known authority has signed it.
    fn is_due(&self, material: &Material, now: i64) -> bool {
        !material.is_trusted
            || self.is_invalid(&material.leaf, now)
            || now >= material.leaf.renew_at()
    }

    /// Has a new key certified and installs both.
    async fn request_certificate(&self) -> Result<(), IdentityError> {
        let pending = self.load_or_create_key()?;
        let client = requests::client().await.map_err(Box::new)?;
        let api: Api<CertificateSigningRequest> = Api::all(client);
        let failed = |source| IdentityError::Api {
            name: pending.name.clone(),
            source: Box::new(source),
        };
        match bounded(api.create(&PostParams::default(), &self.request_object(&pending)?)).await {
            Ok(_) => tracing::info!(name = pending.name, "certificate requested"),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(failed(error)),
        }
        let only = WatchParams::default()
            .fields(&format!("metadata.name={}", pending.name))
            .timeout(WATCH_SECONDS);
        // Resource version 0: the watch begins with the current object.
        let mut events = bounded(api.watch(&only, "0"))
            .await
            .map_err(failed)?
            .boxed();
        while let Some(event) = events.next().await {
            let (WatchEvent::Added(object) | WatchEvent::Modified(object)) =
                event.map_err(failed)?
            else {
                continue;
            };
            if let Some(certificate) = self.check_status(&pending, &object)? {
                return self.install(&certificate);
            }
        }
        Err(IdentityError::Waiting { name: pending.name })
    }

    fn check_status(
        &self,
        pending: &Pending,
        object: &CertificateSigningRequest,
    ) -> Result<Option<Vec<u8>>, IdentityError> {
        let status = object.status.clone().unwrap_or_default();
        if let Some(certificate) = status.certificate.filter(|bytes| !bytes.0.is_empty()) {
            return Ok(Some(certificate.0));
        }
        let refused = status
            .conditions
            .into_iter()
            .flatten()
            .find(|condition| ["Denied", "Failed"].contains(&condition.type_.as_str()));
        let Some(condition) = refused else {
            return Ok(None);
        };
        // A request with the same key has the same name, and would find this refusal again.
        self.remove_file(&self.next_key())?;
        let message = condition.message.or(condition.reason).unwrap_or_default();
        Err(IdentityError::Refused {
            name: pending.name.clone(),
            verdict: condition.type_,
            message,
        })
    }

    fn request_object(
        &self,
        pending: &Pending,
    ) -> Result<CertificateSigningRequest, IdentityError> {
        let mut params = CertificateParams::new(["margay-node".to_owned()])?;
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, self.common_name());
        params
            .distinguished_name
            .push(DnType::OrganizationName, "margay:nodes");
        let request = params.serialize_request(&pending.key)?.pem()?;
        Ok(CertificateSigningRequest {
            metadata: ObjectMeta {
                name: Some(pending.name.clone()),
                ..ObjectMeta::default()
            },
            spec: CertificateSigningRequestSpec {
                request: ByteString(request.into_bytes()),
                signer_name: SIGNER.to_owned(),
                expiration_seconds: i32::try_from(LIFETIME.as_secs()).ok(),
                usages: Some(USAGES.map(str::to_owned).to_vec()),
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        })
    }

    /// Loads the key that is being certified, or generates it.
    fn load_or_create_key(&self) -> Result<Pending, IdentityError> {
        let path = self.next_key();
        let kept = fs::read_to_string(&path)
            .ok()
            .and_then(|pem| KeyPair::from_pem(&pem).ok());
        let key = match kept {
            Some(key) => key,
            None => {
                let folder = fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(&self.folder);
                folder.map_err(|source| IdentityError::Io {
                    path: self.folder.clone(),
                    source,
                })?;
                let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
                self.write_private(&path, key.serialize_pem().as_bytes())?;
                key
            }
        };
        let hash = Sha256::digest(key.subject_public_key_info());
        let hash = HEXLOWER.encode(&hash[..8]);
        Ok(Pending {
            key,
            name: format!("margay-node-{}-{hash}", self.node),
        })
    }

    /// Installs the certificate and its key. Between the two renames the pair does not match;
    /// whoever reads it then keeps the former one.
    fn install(&self, certificate: &[u8]) -> Result<(), IdentityError> {
        let next = self.folder.join("next.crt");
        self.write_private(&next, certificate)?;
        for (from, to) in [(next, "tls.crt"), (self.next_key(), "tls.key")] {
            fs::rename(&from, self.folder.join(to))
                .map_err(|source| IdentityError::Io { path: from, source })?;
        }
        tracing::info!("certificate installed");
        Ok(())
    }

    fn next_key(&self) -> PathBuf {
        self.folder.join("next.key")
    }

    fn write_private(&self, path: &Path, content: &[u8]) -> Result<(), IdentityError> {
        let write = || {
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(path)?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().map_err(|source| IdentityError::Io {
            path: path.to_owned(),
            source,
        })
    }

    fn remove_file(&self, path: &Path) -> Result<(), IdentityError> {
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(IdentityError::Io {
                path: path.to_owned(),
                source,
            }),
            _ => Ok(()),
        }
    }
}

fn now() -> i64 {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    i64::try_from(seconds).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{
        BasicConstraints, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
    };
    use std::os::unix::fs::PermissionsExt;

    fn mk_identity(folder: &Path) -> Identity {
        Identity::new("n1", folder, &folder.join("ca"))
    }

    struct Authority {
        issuer: Issuer<'static, KeyPair>,
        pem: String,
    }

    fn mk_authority() -> Authority {
        let mut params = CertificateParams::new([]).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "margay-ca");
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("an authority").pem();
        Authority {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// Writes a certificate of that node to the directory, valid in 1970 from 1000 s to 4000 s, or
    /// until 2100.
    fn issue(identity: &Identity, authority: &Authority, node: &str, ends: bool) {
        let mut params = CertificateParams::new(["margay-node".to_owned()]).expect("parameters");
        params
            .distinguished_name
            .push(DnType::CommonName, format!("margay:node:{node}"));
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        params.not_before = epoch + Duration::from_secs(1000);
        params.not_after = if ends {
            epoch + Duration::from_secs(4000)
        } else {
            rcgen::date_time_ymd(2100, 1, 1)
        };
        let key = KeyPair::generate().expect("a key");
        let certificate = params
            .signed_by(&key, &authority.issuer)
            .expect("a certificate")
            .pem();
        fs::create_dir_all(&identity.folder).expect("a folder");
        fs::write(identity.folder.join("tls.crt"), certificate).expect("write");
        fs::write(identity.folder.join("tls.key"), key.serialize_pem()).expect("write");
    }

    fn trust(identity: &Identity, authorities: &[&Authority]) {
        fs::create_dir_all(&identity.ca).expect("a folder");
        let text: String = authorities
            .iter()
            .map(|authority| authority.pem.as_str())
            .collect();
        fs::write(identity.ca.join("ca.crt"), text).expect("write");
    }

    /// Loads the files, whatever node they are for.
    fn material(identity: &Identity) -> std::sync::Arc<Material> {
        Tls::load(Files::in_dirs(&identity.folder, &identity.ca))
            .expect("readable files")
            .current()
    }

    #[test]
    fn it_is_renewed_at_two_thirds_of_its_life_and_never_used_outside_of_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let (identity, authority) = (mk_identity(folder.path()), mk_authority());
        trust(&identity, &[&authority]);
        issue(&identity, &authority, "n1", true);
        let own = material(&identity);
        let table = [
            (999, true, true),
            (1000, false, false),
            (2999, false, false),
            (3000, false, true),
            (3999, false, true),
            (4000, true, true),
        ];
        for (now, unfit, due) in table {
            assert_eq!(
                (
                    identity.is_invalid(&own.leaf, now),
                    identity.is_due(&own, now)
                ),
                (unfit, due),
                "at {now}"
            );
        }
        issue(&identity, &authority, "n2", true);
        assert!(identity.is_invalid(&material(&identity).leaf, 2000));
    }

    #[test]
    fn a_certificate_of_a_removed_authority_is_due_and_requested_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let (identity, old, new) = (mk_identity(folder.path()), mk_authority(), mk_authority());
        issue(&identity, &old, "n1", false);
        let now = 2000;
        for (authorities, is_of_one) in
            [(&[&old][..], true), (&[&new, &old], true), (&[&new], false)]
        {
            trust(&identity, authorities);
            assert_eq!(identity.is_due(&material(&identity), now), !is_of_one);
            match identity.load() {
                Ok(_) => assert!(is_of_one, "nobody vouches for it"),
                Err(error) => {
                    assert!(!is_of_one && identity.is_recoverable(&error), "{error}");
                    assert!(
                        error.to_string().contains("none of the authorities in"),
                        "{error}"
                    );
                }
            }
        }
        issue(&identity, &new, "n1", false);
        assert!(!identity.is_due(&material(&identity), now) && identity.load().is_ok());
    }

    #[test]
    fn a_request_that_a_crash_interrupted_goes_on_with_its_key_and_a_refused_one_with_another() {
        let folder = tempfile::tempdir().expect("a folder");
        let identity = mk_identity(folder.path());
        let first = identity.load_or_create_key().expect("a key");
        assert_eq!(
            identity.load_or_create_key().expect("the same key").name,
            first.name
        );
        let mode = fs::metadata(identity.next_key())
            .expect("it is kept")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);

        let mut object = identity.request_object(&first).expect("a request");
        let text = String::from_utf8(object.spec.request.0.clone()).expect("PEM");
        let parsed =
            CertificateSigningRequestParams::from_pem(&text).expect("a request signed by its key");
        assert_eq!(parsed.params.subject_alt_names.len(), 1);
        assert!(matches!(identity.check_status(&first, &object), Ok(None)));
        let condition = serde_json::json!({
            "conditions": [{"type": "Denied", "status": "True", "message": "no"}],
        });
        object.status = serde_json::from_value(condition).expect("a status");
        let refused = identity
            .check_status(&first, &object)
            .expect_err("it was denied")
            .to_string();
        assert!(refused.contains("Denied: no"), "{refused}");
        assert_ne!(
            identity.load_or_create_key().expect("another key").name,
            first.name
        );
    }

    #[test]
    fn certificate_and_key_come_into_use_together() {
        let folder = tempfile::tempdir().expect("a folder");
        let identity = mk_identity(folder.path());
        let pending = identity.load_or_create_key().expect("a key");
        identity.install(b"certificate").expect("put");
        assert_eq!(
            fs::read(identity.folder.join("tls.crt")).expect("there"),
            b"certificate"
        );
        assert_eq!(
            fs::read_to_string(identity.folder.join("tls.key")).expect("there"),
            pending.key.serialize_pem()
        );
        assert!(!identity.next_key().exists());
    }
}
