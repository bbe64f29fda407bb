//! Choice of the storage of a cluster.
//!
//! It is made once, when a program starts: later answers of the API server, or their absence, never
//! move a running program to the other storage, because two programs that write to different ones
//! would assign addresses twice.

use std::fmt;
use std::str::FromStr;

/// Storage of Calico's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// `crd.projectcalico.org/v1`: clusters on which Calico has run, with users' metadata in an
    /// annotation.
    V1,
    /// `projectcalico.org/v3`: objects are stored as users write them.
    #[default]
    V3,
}

impl Mode {
    /// API group.
    pub fn group(self) -> &'static str {
        match self {
            Self::V1 => "crd.projectcalico.org",
            Self::V3 => crate::v3::GROUP,
        }
    }

    /// API version.
    pub fn version(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V3 => crate::v3::VERSION,
        }
    }

    /// Returns `group/version`, which is also the value of the setting `CALICO_API_GROUP`.
    pub fn api_version(self) -> String {
        format!("{}/{}", self.group(), self.version())
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.api_version())
    }
}

/// A setting that names no storage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?}: not a storage of Calico's data; use projectcalico.org/v3 or crd.projectcalico.org/v1, \
     or leave it unset for detection"
)]
pub struct ModeError(String);

impl FromStr for Mode {
    type Err = ModeError;

    fn from_str(text: &str) -> Result<Self, ModeError> {
        let all = [Self::V1, Self::V3];
        all.into_iter()
            .find(|mode| mode.api_version() == text)
            .ok_or_else(|| ModeError(text.to_owned()))
    }
}

/// The chosen storage and the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The storage.
    pub mode: Mode,
    /// Reason, for the log.
    pub reason: String,
}

/// Facts that the choice depends on.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// Names of all API groups that the API server serves.
    pub groups: Vec<String>,
    /// Phase of the DatastoreMigration, if there is one. Only the operator reads it; the others get
    /// the result as a setting.
    pub migration: Option<String>,
}

/// Chooses as Calico does: the newer storage only where it alone is served; where both are served
/// the data is in the older one, unless a migration has moved it. A cluster that serves neither is
/// a new one whose CRDs are being installed: the newer.
pub fn decide(evidence: &Evidence) -> Decision {
    let serves = |mode: Mode| evidence.groups.iter().any(|group| group == mode.group());
    let phase = evidence.migration.as_deref().unwrap_or_default();
    let (mode, reason) = match (serves(Mode::V1), serves(Mode::V3)) {
        _ if ["Converged", "Complete"].contains(&phase) => {
            (Mode::V3, format!("its DatastoreMigration is {phase}"))
        }
        (true, true) => (
            Mode::V1,
            "the API server serves both groups, and the data is in the older one".to_owned(),
        ),
        (true, false) => (
            Mode::V1,
            format!("the API server serves {} only", Mode::V1.group()),
        ),
        (false, true) => (
            Mode::V3,
            format!("the API server serves {} only", Mode::V3.group()),
        ),
        (false, false) => (
            Mode::V3,
            "the API server serves neither group yet".to_owned(),
        ),
    };
    Decision { mode, reason }
}

/// Number of requests to the API server before the fallback applies.
const TRIES: usize = 10;

/// Determines the storage: the setting if there is one, else from the facts that `ask` returns.
/// `pause` is awaited between requests. If the API server cannot list its groups, the fallback is
/// the older storage, as with Calico: such a cluster has been configured by somebody and has data.
pub async fn discover<E: fmt::Display>(
    setting: &str,
    mut ask: impl AsyncFnMut() -> Result<Evidence, E>,
    mut pause: impl AsyncFnMut(),
) -> Result<Decision, ModeError> {
    if !setting.is_empty() {
        return Ok(Decision {
            mode: setting.parse()?,
            reason: "configured by CALICO_API_GROUP".to_owned(),
        });
    }
    let mut tries = 1;
    loop {
        match ask().await {
            Ok(evidence) => return Ok(decide(&evidence)),
            Err(error) if tries == TRIES => {
                let reason = format!("the API groups could not be listed: {error}");
                return Ok(Decision {
                    mode: Mode::V1,
                    reason,
                });
            }
            Err(_) => tries += 1,
        }
        pause().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evidence(groups: &[&str], migration: Option<&str>) -> Evidence {
        let groups = groups.iter().map(|group| (*group).to_owned()).collect();
        Evidence {
            groups,
            migration: migration.map(str::to_owned),
        }
    }

    #[test]
    fn decisions() {
        const V1: &str = "crd.projectcalico.org";
        const V3: &str = "projectcalico.org";
        let table: [(&[&str], Option<&str>, Mode); 7] = [
            (&["apps", V3], None, Mode::V3),
            (&["apps", V1], None, Mode::V1),
            (&[V3, V1], None, Mode::V1),
            (&["apps"], None, Mode::V3),
            (&[V3, V1], Some("Migrating"), Mode::V1),
            (&[V3, V1], Some("Converged"), Mode::V3),
            (&[V3, V1], Some("Complete"), Mode::V3),
        ];
        for (groups, migration, expected) in table {
            let found = decide(&evidence(groups, migration));
            assert_eq!(
                found.mode, expected,
                "{groups:?} {migration:?}: {}",
                found.reason
            );
        }
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::pin!(work).poll(&mut context) {
            std::task::Poll::Ready(value) => value,
            std::task::Poll::Pending => panic!("nothing here waits"),
        }
    }

    #[test]
    fn with_the_setting_the_api_server_is_not_asked() {
        let never = async || -> Result<Evidence, String> { panic!("asked") };
        let found = run(discover("projectcalico.org/v3", never, async || {})).expect("a storage");
        assert_eq!(found.mode, Mode::V3);
        let wrong = run(discover("calico", never, async || {}))
            .expect_err("no storage")
            .to_string();
        assert!(
            wrong.starts_with("\"calico\": not a storage") && wrong.contains("leave it unset"),
            "{wrong}"
        );
    }

    #[test]
    fn errors_are_retried_and_then_the_older_storage_is_used() {
        let mut left = 3;
        let ask = async || {
            left -= 1;
            if left > 0 {
                Err("not yet")
            } else {
                Ok(evidence(&["projectcalico.org"], None))
            }
        };
        assert_eq!(
            run(discover("", ask, async || {})).expect("a storage").mode,
            Mode::V3
        );
        let mut pauses = 0;
        let found = run(discover(
            "",
            async || Err("forbidden"),
            async || pauses += 1,
        ))
        .expect("a storage");
        assert_eq!((found.mode, pauses), (Mode::V1, TRIES - 1));
        assert!(found.reason.contains("forbidden"), "{}", found.reason);
    }
}
