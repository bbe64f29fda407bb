//! Identity and validity of a certificate.

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::AttributeTypeAndValue;

use super::TlsError;

/// The holder of a certificate; the connect info of every served connection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer {
    /// The subject's CN.
    pub common_name: String,
    /// The subject's O; empty if it has none.
    pub organization: String,
}

/// Holder and validity of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// The holder.
    pub peer: Peer,
    /// Start of its validity, in seconds since 1970.
    pub not_before: i64,
    /// End of its validity, in seconds since 1970.
    pub not_after: i64,
}

impl Leaf {
    /// Reads a certificate without checking its signature: the handshake has done that.
    pub fn parse(certificate: &CertificateDer<'_>) -> Result<Self, TlsError> {
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|error| TlsError::Leaf(error.to_string()))?;
        let subject = parsed.subject();
        let peer = Peer {
            common_name: single("CN", subject.iter_common_name())?
                .ok_or_else(|| TlsError::Leaf(format!("subject {subject} must have a CN")))?,
            organization: single("O", subject.iter_organization())?.unwrap_or_default(),
        };
        let life = parsed.validity();
        Ok(Self {
            peer,
            not_before: life.not_before.timestamp(),
            not_after: life.not_after.timestamp(),
        })
    }

    /// Time of renewal, when two thirds of its validity are over, in seconds since 1970.
    pub fn renew_at(&self) -> i64 {
        self.not_before + self.not_after.saturating_sub(self.not_before) / 3 * 2
    }
}

/// Returns the holder of a certificate that the handshake has verified.
pub fn peer(certificate: &CertificateDer<'_>) -> Result<Peer, TlsError> {
    Leaf::parse(certificate).map(|leaf| leaf.peer)
}

/// Returns the only value of an attribute. Two values would let two readers see two identities, so
/// they are refused.
fn single<'a>(
    name: &str,
    mut values: impl Iterator<Item = &'a AttributeTypeAndValue<'a>>,
) -> Result<Option<String>, TlsError> {
    let Some(first) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(TlsError::Leaf(format!("subject must have only one {name}")));
    }
    let text = first
        .as_str()
        .map_err(|error| TlsError::Leaf(format!("{name}: {error}")))?;
    Ok(Some(text.to_owned()))
}
