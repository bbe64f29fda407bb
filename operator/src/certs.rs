//! The cluster's certificate authority (CA): its stored form, and the times at which it or a
//! certificate must be renewed. Pure; [`issue`] makes keys and signatures.
//!
//! A new CA is trusted everywhere before it signs anything, and the old one stays trusted until it
//! expires, so that no rotation breaks a connection. Daemons reload changed files; nothing is
//! restarted.

pub mod issue;
pub mod secret;

use jiff::{SignedDuration, Timestamp};
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::pem::parse_x509_pem;

use crate::names::{CAPTURE_SECRET, READER_SECRET, TYPHA_SECRET};

/// Validity of a CA.
pub const CA_LIFE: SignedDuration = SignedDuration::from_hours(10 * 365 * 24);
/// Validity of a component's certificate.
pub const LEAF_LIFE: SignedDuration = SignedDuration::from_hours(90 * 24);
/// Maximum validity of a node's certificate; the agent renews it at two thirds.
pub const NODE_LIFE: SignedDuration = SignedDuration::from_hours(30 * 24);
/// Time in which a new CA is trusted before it signs: a day, many times what a ConfigMap takes to
/// reach every pod.
const SPREAD: SignedDuration = SignedDuration::from_hours(24);

/// A certificate and its key, both PEM. Debug output shows neither.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// The private key.
    pub key: String,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pair(..)")
    }
}

/// Contents of the CA's Secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// The CA that signs.
    pub current: Pair,
    /// The next CA: trusted, but does not sign yet.
    pub next: Option<Pair>,
    /// The former CA (certificate only): still trusted, but does not sign any more.
    pub previous: Option<String>,
}

impl Authority {
    /// Returns all trusted certificates as one PEM text.
    pub fn bundle(&self) -> String {
        let next = self.next.as_ref().map(|pair| pair.certificate.as_str());
        [
            Some(self.current.certificate.as_str()),
            next,
            self.previous.as_deref(),
        ]
        .into_iter()
        .flatten()
        .map(|pem| format!("{}\n", pem.trim_end()))
        .collect()
    }
}

/// Certificates as stored in the cluster.
#[derive(Clone, Debug, Default)]
pub struct Stored {
    /// The CA and the version of its Secret; none if there is no Secret.
    pub authority: Option<(Authority, String)>,
    /// Reason why the CA's Secret cannot be used.
    pub broken: Option<String>,
    /// Certificate in typha's Secret.
    pub typha: Option<String>,
    /// Certificate in the reader's Secret.
    pub reader: Option<String>,
    /// Certificate in the Secret for captures.
    pub capture: Option<String>,
}

/// Certificate of a component.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Name of its Secret.
    pub secret: &'static str,
    /// Common name.
    pub common_name: &'static str,
    /// Organization, if any.
    pub organization: Option<&'static str>,
    /// DNS names, in order.
    pub dns_names: &'static [&'static str],
}

/// Typha's certificate.
pub const TYPHA: Leaf = Leaf {
    secret: TYPHA_SECRET,
    common_name: "margay-typha",
    organization: None,
    dns_names: &["margay-typha", "margay-typha.margay-system.svc"],
};

/// Certificate of a person or tool that uses the debug services.
pub const READER: Leaf = Leaf {
    secret: READER_SECRET,
    common_name: "margay:reader",
    organization: Some("margay:readers"),
    dns_names: &[],
};

/// Certificate of a person who captures packets of pods. Its Secret is another one than the
/// readers', so that RBAC can give one without the other.
pub const CAPTURE: Leaf = Leaf {
    secret: CAPTURE_SECRET,
    common_name: "margay:capture",
    organization: Some("margay:capturers"),
    dns_names: &[],
};

/// A PEM text that is not a certificate.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a certificate in PEM: {0}")]
pub struct CertificateError(String);

/// Fields of a certificate that decisions depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFacts {
    /// Valid from.
    pub not_before: Timestamp,
    /// Valid until.
    pub not_after: Timestamp,
    /// Common name, empty if none.
    pub common_name: String,
    /// Organization, empty if none.
    pub organization: String,
    /// DNS names in order.
    pub dns_names: Vec<String>,
    /// Identifier of its key.
    pub subject_key: Vec<u8>,
    /// Identifier of the key that signed it.
    pub authority_key: Vec<u8>,
}

impl CertificateFacts {
    /// Reads the first certificate of a PEM text.
    pub fn parse(pem: &str) -> Result<Self, CertificateError> {
        let (_, block) =
            parse_x509_pem(pem.as_bytes()).map_err(|error| CertificateError(error.to_string()))?;
        let certificate = block
            .parse_x509()
            .map_err(|error| CertificateError(error.to_string()))?;
        let time = |seconds| {
            Timestamp::from_second(seconds).map_err(|error| CertificateError(error.to_string()))
        };
        let mut facts = Self {
            not_before: time(certificate.validity().not_before.timestamp())?,
            not_after: time(certificate.validity().not_after.timestamp())?,
            common_name: first(certificate.subject().iter_common_name()),
            organization: first(certificate.subject().iter_organization()),
            dns_names: Vec::new(),
            subject_key: Vec::new(),
            authority_key: Vec::new(),
        };
        for extension in certificate.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(names) => {
                    facts.dns_names = names.general_names.iter().filter_map(dns_name).collect();
                }
                ParsedExtension::SubjectKeyIdentifier(id) => facts.subject_key = id.0.to_vec(),
                ParsedExtension::AuthorityKeyIdentifier(id) => {
                    if let Some(id) = &id.key_identifier {
                        facts.authority_key = id.0.to_vec();
                    }
                }
                _ => {}
            }
        }
        Ok(facts)
    }

    /// Returns true when less than a third of its validity is left.
    fn is_ending(&self, now: Timestamp) -> bool {
        now >= self.renewal()
    }

    /// Time of renewal, when two thirds of its validity are over.
    fn renewal(&self) -> Timestamp {
        let life = self.not_after.duration_since(self.not_before);
        self.not_after
            .checked_sub(life / 3)
            .unwrap_or(self.not_after)
    }
}

fn first<'a>(
    mut values: impl Iterator<Item = &'a x509_parser::x509::AttributeTypeAndValue<'a>>,
) -> String {
    values
        .next()
        .and_then(|value| value.as_str().ok())
        .unwrap_or_default()
        .to_owned()
}

fn dns_name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    }
}

/// Next step of the CA's rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// No step is due.
    Keep,
    /// Create a CA: there is none, or it has expired.
    Create,
    /// Create the next CA, which is trusted from now on.
    Prepare,
    /// Let the next CA sign: it is known everywhere.
    Promote,
    /// Remove the former CA, which has expired.
    Retire,
}

/// Returns the step that is due.
pub fn step(authority: Option<&Authority>, now: Timestamp) -> Result<Step, CertificateError> {
    let Some(authority) = authority else {
        return Ok(Step::Create);
    };
    let current = CertificateFacts::parse(&authority.current.certificate)?;
    if current.not_after <= now {
        return Ok(match &authority.next {
            Some(_) => Step::Promote,
            None => Step::Create,
        });
    }
    if let Some(previous) = &authority.previous
        && CertificateFacts::parse(previous)?.not_after <= now
    {
        return Ok(Step::Retire);
    }
    match &authority.next {
        Some(next) => {
            let known = CertificateFacts::parse(&next.certificate)?.not_before + SPREAD;
            Ok(if known <= now {
                Step::Promote
            } else {
                Step::Keep
            })
        }
        None if current.is_ending(now) => Ok(Step::Prepare),
        None => Ok(Step::Keep),
    }
}

/// Returns the reason why a certificate must be issued (again), if it must.
pub fn due(
    leaf: &Leaf,
    stored: Option<&str>,
    authority: &CertificateFacts,
    now: Timestamp,
) -> Option<&'static str> {
    let Some(pem) = stored else {
        return Some("it is missing");
    };
    let Ok(facts) = CertificateFacts::parse(pem) else {
        return Some("it cannot be read");
    };
    if facts.authority_key != authority.subject_key {
        return Some("it was signed by another CA");
    }
    if facts.common_name != leaf.common_name
        || facts.organization != leaf.organization.unwrap_or_default()
        || facts.dns_names != leaf.dns_names
    {
        return Some("it is for other names");
    }
    facts
        .is_ending(now)
        .then_some("less than a third of its validity is left")
}

/// Returns the time of the next check: the earliest at which a step or a renewal can become due.
pub fn next_check(stored: &Stored, now: Timestamp) -> Timestamp {
    let mut moments = vec![now + SignedDuration::from_hours(24)];
    if let Some((authority, _)) = &stored.authority {
        let current = CertificateFacts::parse(&authority.current.certificate);
        moments.extend(current.map(|facts| facts.renewal()));
        if let Some(next) = &authority.next {
            moments.extend(
                CertificateFacts::parse(&next.certificate).map(|facts| facts.not_before + SPREAD),
            );
        }
        if let Some(previous) = &authority.previous {
            moments.extend(CertificateFacts::parse(previous).map(|facts| facts.not_after));
        }
    }
    let leaves = [&stored.typha, &stored.reader, &stored.capture];
    for pem in leaves.into_iter().flatten() {
        moments.extend(CertificateFacts::parse(pem).map(|facts| facts.renewal()));
    }
    moments
        .into_iter()
        .filter(|moment| *moment > now)
        .min()
        .unwrap_or(now)
}

#[cfg(test)]
#[path = "certs/tests.rs"]
mod tests;
