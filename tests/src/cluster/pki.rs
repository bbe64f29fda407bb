//! The cluster's certificates and kubeconfigs.
//!
//! One authority signs everything, lives as long as the state folder and is thrown away with it.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::json;

/// The folder of certificates, and the authority that signs them.
pub struct Pki {
    folder: PathBuf,
    authority: Issuer<'static, KeyPair>,
    authority_pem: String,
}

/// Subject of a certificate.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// File name, without ending.
    pub file: &'a str,
    /// The user that Kubernetes sees.
    pub name: &'a str,
    /// The group that Kubernetes sees.
    pub group: Option<&'a str>,
}

impl Pki {
    /// Makes a new authority, and the key pair that signs service account tokens, in `folder`.
    pub fn create(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let (params, key, authority_pem) = authority("margay-cluster")?;
        let (_, _, front) = authority("margay-front-proxy")?;
        write(&folder.join("ca.crt"), &authority_pem)?;
        write(&folder.join("ca.key"), &key.serialize_pem())?;
        write(&folder.join("front.crt"), &front)?;
        let tokens = KeyPair::generate()?;
        write(&folder.join("sa.key"), &tokens.serialize_pem())?;
        write(&folder.join("sa.pub"), &tokens.public_key_pem())?;
        Ok(Self {
            folder: folder.to_owned(),
            authority: Issuer::new(params, key),
            authority_pem,
        })
    }

    /// Signs a certificate for client and server use and writes it beside its key.
    pub fn leaf(&self, subject: Subject<'_>, names: &[String]) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, subject.name);
        if let Some(group) = subject.group {
            params
                .distinguished_name
                .push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.authority)?;
        write(
            &self.folder.join(format!("{}.crt", subject.file)),
            &certificate.pem(),
        )?;
        write(
            &self.folder.join(format!("{}.key", subject.file)),
            &key.serialize_pem(),
        )
    }

    /// Signs a client certificate and writes a kubeconfig that carries it, for the API server at
    /// `server`.
    pub fn client(
        &self,
        subject: Subject<'_>,
        names: &[String],
        server: &str,
        out: &Path,
    ) -> Result<()> {
        self.leaf(subject, names)?;
        let read = |ending: &str| {
            let path = self.folder.join(format!("{}.{ending}", subject.file));
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "margay",
            "contexts": [{"name": "margay", "context": {"cluster": "margay", "user": "margay"}}],
            "clusters": [{"name": "margay", "cluster": {
                "server": server,
                "certificate-authority-data": BASE64.encode(&self.authority_pem),
            }}],
            "users": [{"name": "margay", "user": {
                "client-certificate-data": BASE64.encode(read("crt")?),
                "client-key-data": BASE64.encode(read("key")?),
            }}],
        });
        write(out, &serde_json::to_string_pretty(&config)?)
    }
}

fn authority(name: &str) -> Result<(CertificateParams, KeyPair, String)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new([])?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    let pem = params.self_signed(&key)?.pem();
    Ok((params, key, pem))
}

/// Names by which clients may call the API server.
pub fn apiserver_names(control_plane: Ipv4Addr, service: Ipv4Addr) -> Vec<String> {
    let addresses =
        [control_plane, service, Ipv4Addr::LOCALHOST].map(|address| address.to_string());
    let names = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
    ]
    .map(str::to_owned);
    addresses.into_iter().chain(names).collect()
}

fn write(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = std::fs::File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    Ok(())
}
