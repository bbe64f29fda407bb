//! Names of objects and identities that several modules share.

/// Namespace of every component but the operator.
pub const NAMESPACE: &str = "margay-system";
/// Name of typha's objects.
pub const TYPHA: &str = "margay-typha";
/// Name of the node agent's objects.
pub const NODE: &str = "margay-node";
/// Secret in the components' namespace with the values of OpenTelemetry's variables that are
/// secrets.
pub const TELEMETRY_SECRET: &str = "margay-telemetry";
/// Variable with the storage of Calico's data, for components.
pub const STORAGE_VARIABLE: &str = "CALICO_API_GROUP";
/// Name of the CA's Secret (in the operator's namespace) and ConfigMap (in the components'
/// namespace).
pub const CA_NAME: &str = "margay-ca";
/// Name of the Secret with typha's certificate.
pub const TYPHA_SECRET: &str = "margay-typha-tls";
/// Name of the Secret with the certificate for manual debugging.
pub const READER_SECRET: &str = "margay-reader-tls";
/// Name of the Secret with the certificate for captures of packets.
pub const CAPTURE_SECRET: &str = "margay-capture-tls";
/// Prefix of the common name of nodes' certificates, before the node's name.
pub const COMMON_NAME_PREFIX: &str = "margay:node:";
/// Organization of nodes' certificates.
pub const ORGANIZATION: &str = "margay:nodes";
/// The only DNS name of nodes' certificates.
pub const DNS_NAME: &str = "margay-node";
