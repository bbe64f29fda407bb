//! Certificates of a run: one authority, a server, and a certificate per node with a common key.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use margay_runtime::tls::{Files, Tls};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};

/// Name in the server's certificate.
pub const SERVER: &str = "margay-typha";

/// Folder of certificates.
#[derive(Debug, Clone)]
pub struct Identities(PathBuf);

impl Identities {
    /// Certificates in an existing folder.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self(folder.into())
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Writes certificates of a new authority for the server and that many nodes.
    pub fn create(folder: impl Into<PathBuf>, nodes: usize) -> Result<Self> {
        let identities = Self(folder.into());
        let mut params = CertificateParams::new([])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let authority = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);
        std::fs::create_dir_all(&identities.0)?;
        std::fs::write(identities.0.join("ca.crt"), authority)?;
        let key = KeyPair::generate()?;
        identities.issue(&issuer, &key, "server", SERVER, "")?;
        for node in 0..nodes {
            let name = super::model::node_name(node);
            identities.issue(
                &issuer,
                &key,
                &name,
                &format!("margay:node:{name}"),
                "margay:nodes",
            )?;
        }
        Ok(identities)
    }

    fn issue(
        &self,
        issuer: &Issuer<'_, KeyPair>,
        key: &KeyPair,
        folder: &str,
        name: &str,
        organization: &str,
    ) -> Result<()> {
        let mut params = CertificateParams::new([SERVER.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, name);
        if !organization.is_empty() {
            params
                .distinguished_name
                .push(DnType::OrganizationName, organization);
        }
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let folder = self.0.join(folder);
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("tls.crt"), params.signed_by(key, issuer)?.pem())?;
        std::fs::write(folder.join("tls.key"), key.serialize_pem())?;
        Ok(())
    }

    /// Material of the server.
    pub fn server(&self) -> Result<Tls> {
        self.load("server")
    }

    /// Material of a node.
    pub fn node(&self, node: usize) -> Result<Tls> {
        self.load(&super::model::node_name(node))
    }

    fn load(&self, name: &str) -> Result<Tls> {
        Tls::load(Files::in_dirs(self.0.join(name), &self.0))
            .with_context(|| format!("certificate of {name}"))
    }
}
