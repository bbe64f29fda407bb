//! Makes keys and signs certificates.

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SerialNumber,
};
use sha2::{Digest, Sha256};
use x509_parser::time::ASN1Time;

use super::{Authority, CA_LIFE, Facts, LEAF_LIFE, Leaf, NODE_LIFE, Pair, Step};

/// Clocks of nodes may be behind ours by so much.
const SKEW: SignedDuration = SignedDuration::from_mins(5);

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The library refused.
    #[error("certificate {name}: {source}")]
    Library {
        /// Common name.
        name: String,
        /// Why.
        source: rcgen::Error,
    },
    /// The authority cannot be read.
    #[error("the authority in Secret margay-operator/margay-ca: {0}; delete the Secret to have a new one made")]
    Authority(#[from] super::Unreadable),
    /// A moment that X.509 cannot express.
    #[error("time {0} does not fit in a certificate; correct the clock of this machine")]
    Time(Timestamp),
}

/// What goes into a certificate besides the key.
struct Contents<'a> {
    common_name: &'a str,
    organization: Option<&'a str>,
    dns_names: &'a [&'a str],
    not_before: Timestamp,
    not_after: Timestamp,
}

/// Carries out a step on the stored authority. [`Step::Keep`] gives the same value again.
pub fn advance(stored: Option<&Authority>, step: Step, now: Timestamp) -> Result<Authority, Error> {
    let Some(stored) = stored.filter(|_| step != Step::Create) else {
        return Ok(Authority { current: new_authority(now)?, next: None, previous: None });
    };
    let mut authority = stored.clone();
    match step {
        Step::Keep | Step::Create => {}
        Step::Prepare => authority.next = Some(new_authority(now)?),
        Step::Promote => {
            if let Some(next) = authority.next.take() {
                let old = std::mem::replace(&mut authority.current, next);
                authority.previous = Some(old.certificate);
            }
        }
        Step::Retire => authority.previous = None,
    }
    Ok(authority)
}

/// Makes a self-signed authority, valid from now.
fn new_authority(now: Timestamp) -> Result<Pair, Error> {
    let key = new_key("margay")?;
    let contents = Contents {
        common_name: "margay",
        organization: None,
        dns_names: &[],
        not_before: now,
        not_after: now + CA_LIFE,
    };
    let mut params = params(&contents, &key)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = false;
    let certificate = params.self_signed(&key).map_err(library("margay"))?;
    Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// Makes a key and a certificate for a component.
pub fn leaf(authority: &Authority, leaf: &Leaf, now: Timestamp) -> Result<Pair, Error> {
    let key = new_key(leaf.common_name)?;
    let contents = Contents {
        common_name: leaf.common_name,
        organization: leaf.organization,
        dns_names: leaf.dns_names,
        not_before: now - SKEW,
        not_after: now + LEAF_LIFE,
    };
    Ok(Pair { certificate: end_entity(authority, &contents, &key)?, key: key.serialize_pem() })
}

/// Signs a node's key. Nothing of the request but the key goes into the certificate.
pub fn node(
    authority: &Authority,
    name: &str,
    key: &impl PublicKeyData,
    life: SignedDuration,
    now: Timestamp,
) -> Result<String, Error> {
    let contents = Contents {
        common_name: &format!("{}{name}", crate::csr::COMMON_NAME_PREFIX),
        organization: Some(crate::csr::ORGANIZATION),
        dns_names: &[crate::csr::DNS_NAME],
        not_before: now - SKEW,
        not_after: now + life.min(NODE_LIFE),
    };
    end_entity(authority, &contents, key)
}

fn end_entity(authority: &Authority, contents: &Contents<'_>, key: &impl PublicKeyData) -> Result<String, Error> {
    let end = Facts::parse(&authority.current.certificate)?.not_after;
    let name = contents.common_name;
    let ca_key = KeyPair::from_pem(&authority.current.key).map_err(library("margay"))?;
    let issuer = Issuer::from_ca_cert_pem(&authority.current.certificate, ca_key).map_err(library("margay"))?;
    let contents = Contents { not_after: contents.not_after.min(end), ..*contents };
    let mut params = params(&contents, key)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(key, &issuer).map_err(library(name))?;
    Ok(certificate.pem())
}

fn params(contents: &Contents<'_>, key: &impl PublicKeyData) -> Result<CertificateParams, Error> {
    let names: Vec<String> = contents.dns_names.iter().map(|n| (*n).to_owned()).collect();
    let mut params = CertificateParams::new(names).map_err(library(contents.common_name))?;
    params.distinguished_name = DistinguishedName::new();
    if let Some(organization) = contents.organization {
        params.distinguished_name.push(DnType::OrganizationName, organization);
    }
    params.distinguished_name.push(DnType::CommonName, contents.common_name);
    let time = |moment: Timestamp| {
        ASN1Time::from_timestamp(moment.as_second()).map(|time| time.to_datetime()).map_err(|_| Error::Time(moment))
    };
    params.not_before = time(contents.not_before)?;
    params.not_after = time(contents.not_after)?;
    params.serial_number = Some(serial(contents, key.der_bytes()));
    Ok(params)
}

/// A serial number that differs wherever key or time do: 127 bits of a digest.
fn serial(contents: &Contents<'_>, key: &[u8]) -> SerialNumber {
    let digest = Sha256::new()
        .chain_update(key)
        .chain_update(contents.not_before.as_nanosecond().to_be_bytes())
        .chain_update(contents.common_name)
        .finalize();
    let mut bytes = digest[..16].to_vec();
    bytes[0] &= 0x7f;
    SerialNumber::from_slice(&bytes)
}

fn new_key(name: &str) -> Result<KeyPair, Error> {
    KeyPair::generate().map_err(library(name))
}

fn library(name: &str) -> impl FnOnce(rcgen::Error) -> Error {
    let name = name.to_owned();
    |source| Error::Library { name, source }
}
