//! The standard OpenTelemetry variables that decide where spans go, read once and checked.

use std::path::PathBuf;
use std::time::Duration;

use percent_encoding::percent_decode_str;

/// Time for one export, from the OTLP specification.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One JSON object a line, for machines.
    Json,
    /// For a person at a terminal.
    Text,
}

/// Destinations of telemetry. Read from:
///
/// - `MARGAY_LOG_FORMAT`: `json` or `text`;
/// - `OTEL_EXPORTER_OTLP_ENDPOINT` (`http://HOST:4317`, or `https` with
///   `OTEL_EXPORTER_OTLP_CERTIFICATE`);
/// - `OTEL_EXPORTER_OTLP_TIMEOUT` (milliseconds), `OTEL_EXPORTER_OTLP_HEADERS` (checked here, sent
///   by the exporter), `OTEL_EXPORTER_OTLP_PROTOCOL` (only `grpc`); each also as
///   `OTEL_EXPORTER_OTLP_TRACES_*`, which goes first;
/// - `OTEL_TRACES_EXPORTER` (`otlp` or `none`), `OTEL_SDK_DISABLED`;
/// - `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`.
///
/// `OTEL_TRACES_SAMPLER` and `OTEL_BSP_*` are read by the SDK itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Format of log lines.
    pub format: Format,
    /// Name of this process for the collector.
    pub service: String,
    /// The collector, with its scheme; none: nothing is exported.
    pub endpoint: Option<String>,
    /// CA of the collector's certificate; needed for `https`, as the image has no root
    /// certificates.
    pub certificate: Option<PathBuf>,
    /// Time for one export.
    pub timeout: Duration,
    /// Further attributes of this process, in the order given.
    pub attributes: Vec<(String, String)>,
}

/// An environment variable has an invalid value. Header values may be secrets and are never shown.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{name}={value:?}: {rule}; {remedy}")]
pub struct SettingsError {
    name: String,
    value: String,
    rule: &'static str,
    remedy: &'static str,
}

impl Settings {
    /// `lookup` is the environment; empty values count as absent, as the specification demands.
    pub fn from_env(
        service: &str,
        terminal: bool,
        lookup: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, SettingsError> {
        let env = Env(lookup);
        let mut attributes = env.attributes()?;
        let named = attributes.iter().position(|(key, _)| key == "service.name");
        let named = named.map(|at| attributes.remove(at).1);
        env.check_protocol()?;
        env.check_headers()?;
        let certificate = env.otlp("CERTIFICATE").map(|(_, path)| PathBuf::from(path));
        Ok(Self {
            format: env.format(terminal)?,
            service: env
                .get("OTEL_SERVICE_NAME")
                .or(named)
                .unwrap_or_else(|| service.to_owned()),
            endpoint: env.endpoint(certificate.is_some())?,
            certificate,
            timeout: env.timeout()?,
            attributes,
        })
    }
}

struct Env<F>(F);

impl<F: Fn(&str) -> Option<String>> Env<F> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name)
            .map(|value| value.trim().to_owned())
            .filter(|value| !value.is_empty())
    }

    /// The variable for traces, else the one for every signal; with the name that was found.
    fn otlp(&self, part: &str) -> Option<(String, String)> {
        [
            format!("OTEL_EXPORTER_OTLP_TRACES_{part}"),
            format!("OTEL_EXPORTER_OTLP_{part}"),
        ]
        .into_iter()
        .find_map(|name| self.get(&name).map(|value| (name, value)))
    }

    fn format(&self, terminal: bool) -> Result<Format, SettingsError> {
        let name = "MARGAY_LOG_FORMAT";
        match self.get(name).as_deref() {
            Some("json") => Ok(Format::Json),
            Some("text") => Ok(Format::Text),
            Some(other) => Err(refuse(
                name,
                other,
                "must be json or text",
                "unset it for json",
            )),
            None if terminal => Ok(Format::Text),
            None => Ok(Format::Json),
        }
    }

    fn endpoint(&self, has_certificate: bool) -> Result<Option<String>, SettingsError> {
        if self
            .get("OTEL_SDK_DISABLED")
            .is_some_and(|value| value.eq_ignore_ascii_case("true"))
        {
            return Ok(None);
        }
        let name = "OTEL_TRACES_EXPORTER";
        match self.get(name).as_deref() {
            None | Some("otlp") => {}
            Some("none") => return Ok(None),
            Some(other) => {
                return Err(refuse(
                    name,
                    other,
                    "must be otlp or none",
                    "unset it for otlp",
                ));
            }
        }
        let Some((name, value)) = self.otlp("ENDPOINT") else {
            return Ok(None);
        };
        let endpoint = if value.contains("://") {
            value.clone()
        } else {
            format!("http://{value}")
        };
        let known = endpoint.starts_with("http://") || endpoint.starts_with("https://");
        if !known || endpoint.parse::<http::Uri>().is_err() {
            let rule = "must be a URL of http or https";
            return Err(refuse(
                &name,
                &shown(&value),
                rule,
                "write it like http://127.0.0.1:4317",
            ));
        }
        if endpoint.starts_with("https://") && !has_certificate {
            let rule = "https needs the collector's CA, and the image has no root certificates";
            let remedy = "set OTEL_EXPORTER_OTLP_CERTIFICATE to a file with it";
            return Err(refuse(&name, &shown(&value), rule, remedy));
        }
        Ok(Some(endpoint))
    }

    fn timeout(&self) -> Result<Duration, SettingsError> {
        let Some((name, value)) = self.otlp("TIMEOUT") else {
            return Ok(TIMEOUT);
        };
        match value.parse::<u64>() {
            Ok(millis) if millis > 0 => Ok(Duration::from_millis(millis)),
            _ => Err(refuse(
                &name,
                &value,
                "must be milliseconds, above 0",
                "unset it for 10000",
            )),
        }
    }

    fn check_protocol(&self) -> Result<(), SettingsError> {
        match self.otlp("PROTOCOL") {
            Some((name, value)) if value != "grpc" => {
                let remedy = "unset it and point the endpoint at the collector's gRPC port (4317)";
                Err(refuse(&name, &value, "only grpc is supported", remedy))
            }
            _ => Ok(()),
        }
    }

    fn check_headers(&self) -> Result<(), SettingsError> {
        match self.otlp("HEADERS") {
            Some((name, value)) if pairs(&value).is_none() => {
                let rule = "must be NAME=VALUE pairs separated by commas";
                Err(refuse(
                    &name,
                    "(hidden)",
                    rule,
                    "percent-encode commas within a value",
                ))
            }
            _ => Ok(()),
        }
    }

    fn attributes(&self) -> Result<Vec<(String, String)>, SettingsError> {
        let name = "OTEL_RESOURCE_ATTRIBUTES";
        let Some(value) = self.get(name) else {
            return Ok(Vec::new());
        };
        pairs(&value).ok_or_else(|| {
            let rule = "must be NAME=VALUE pairs separated by commas";
            refuse(
                name,
                &value,
                rule,
                "write it like deployment.environment.name=test",
            )
        })
    }
}

fn refuse(name: &str, value: &str, rule: &'static str, remedy: &'static str) -> SettingsError {
    SettingsError {
        name: name.to_owned(),
        value: value.to_owned(),
        rule,
        remedy,
    }
}

/// Hides a URL's user information, which may hold a password.
pub(super) fn shown(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let authority = rest
        .split_once('/')
        .map_or(rest, |(authority, _)| authority);
    match authority.rfind('@') {
        Some(at) if scheme.is_empty() => format!("(hidden){}", &rest[at..]),
        Some(at) => format!("{scheme}://(hidden){}", &rest[at..]),
        None => url.to_owned(),
    }
}

/// Parses `a=1,b=2` with percent-encoded values; none if a part has no name or no `=`.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let parts = text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (name, value) = part.split_once('=')?;
            let name = name.trim();
            (!name.is_empty()).then(|| {
                let value = percent_decode_str(value.trim()).decode_utf8_lossy();
                (name.to_owned(), value.into_owned())
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(env: &[(&str, &str)]) -> Result<Settings, String> {
        let lookup = |name: &str| {
            env.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        Settings::from_env("margay-node", false, lookup).map_err(|error| error.to_string())
    }

    fn plain() -> Settings {
        Settings {
            format: Format::Json,
            service: "margay-node".to_owned(),
            endpoint: None,
            certificate: None,
            timeout: TIMEOUT,
            attributes: Vec::new(),
        }
    }

    #[test]
    fn an_empty_environment_exports_nothing() {
        assert_eq!(read(&[]), Ok(plain()));
        assert_eq!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]), Ok(plain()));
    }

    #[test]
    fn standard_variables_are_honoured() {
        let all = read(&[
            ("MARGAY_LOG_FORMAT", "text"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://traces:4317"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/etc/otel/ca.crt"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "2500"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_TRACES_EXPORTER", "otlp"),
            (
                "OTEL_RESOURCE_ATTRIBUTES",
                "k8s.node.name=n1, service.name=other,note=a%2Cb%",
            ),
        ]);
        let wanted = Settings {
            format: Format::Text,
            service: "other".to_owned(),
            endpoint: Some("https://traces:4317".to_owned()),
            certificate: Some(PathBuf::from("/etc/otel/ca.crt")),
            timeout: Duration::from_millis(2500),
            attributes: vec![
                ("k8s.node.name".to_owned(), "n1".to_owned()),
                ("note".to_owned(), "a,b%".to_owned()),
            ],
        };
        assert_eq!(all, Ok(wanted));
    }

    #[test]
    fn the_service_name_variable_goes_first() {
        let settings = read(&[
            ("OTEL_SERVICE_NAME", "mine"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=other"),
        ]);
        assert_eq!(
            settings,
            Ok(Settings {
                service: "mine".to_owned(),
                ..plain()
            })
        );
    }

    #[test]
    fn a_scheme_may_be_left_out_and_export_switched_off() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "127.0.0.1:4317");
        let wanted = Some("http://127.0.0.1:4317".to_owned());
        assert_eq!(
            read(&[endpoint]).map(|settings| settings.endpoint),
            Ok(wanted)
        );
        for off in [
            ("OTEL_TRACES_EXPORTER", "none"),
            ("OTEL_SDK_DISABLED", "True"),
        ] {
            assert_eq!(read(&[endpoint, off]), Ok(plain()), "{off:?}");
        }
    }

    #[test]
    fn bad_values_are_refused_with_name_rule_and_remedy() {
        let table = [
            (
                "MARGAY_LOG_FORMAT",
                "xml",
                "must be json or text; unset it for json",
            ),
            (
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                "ftp://x:1",
                "must be a URL of http or https; write it like http://127.0.0.1:4317",
            ),
            (
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                "https://x:1",
                "https needs the collector's CA, and the image has no root certificates; set \
                 OTEL_EXPORTER_OTLP_CERTIFICATE to a file with it",
            ),
            (
                "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
                "10s",
                "must be milliseconds, above 0; unset it for 10000",
            ),
            (
                "OTEL_EXPORTER_OTLP_PROTOCOL",
                "http/protobuf",
                "only grpc is supported; unset it and point the endpoint at the collector's gRPC \
                 port (4317)",
            ),
            (
                "OTEL_TRACES_EXPORTER",
                "zipkin",
                "must be otlp or none; unset it for otlp",
            ),
            (
                "OTEL_RESOURCE_ATTRIBUTES",
                "=x",
                "must be NAME=VALUE pairs separated by commas; write it like \
                 deployment.environment.name=test",
            ),
        ];
        for (name, value, wanted) in table {
            assert_eq!(
                read(&[(name, value)]),
                Err(format!("{name}={value:?}: {wanted}"))
            );
        }
    }

    #[test]
    fn a_bad_header_is_not_shown() {
        let error = read(&[("OTEL_EXPORTER_OTLP_HEADERS", "s3cret")]).expect_err("no pair");
        assert!(!error.contains("s3cret"), "{error}");
        assert!(error.starts_with("OTEL_EXPORTER_OTLP_HEADERS="), "{error}");
    }

    #[test]
    fn of_a_url_no_password_is_shown() {
        let table = [
            ("http://x:4317/a@b", "http://x:4317/a@b"),
            ("ftp://u:s3cret@x:1/a@b", "ftp://(hidden)@x:1/a@b"),
            ("ftp://u:s3@cret@x", "ftp://(hidden)@x"),
            ("u:s3cret@x:1", "(hidden)@x:1"),
        ];
        for (url, wanted) in table {
            assert_eq!(shown(url), wanted);
        }
        for url in [
            "ftp://u:s3cret@x:1",
            "https://u:s3cret@x:1",
            "http://u:s3cret@x y",
        ] {
            let error = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", url)]).expect_err(url);
            assert!(
                !error.contains("s3cret") && error.contains("(hidden)@x"),
                "{error}"
            );
        }
    }
}
