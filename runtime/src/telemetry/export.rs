//! Spans to a collector over OTLP/gRPC.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use opentelemetry::KeyValue;
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use super::settings::shown;
use super::{Error, Settings};

/// Builds the provider for these settings; none if spans are not exported.
pub(super) fn provider(settings: &Settings) -> Result<Option<SdkTracerProvider>, Error> {
    let Some(endpoint) = &settings.endpoint else {
        return Ok(None);
    };
    let refused = |reason: String| Error::Export {
        endpoint: shown(endpoint),
        reason,
    };
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(refused(
            "spans can be exported only from within a tokio runtime".to_owned(),
        ));
    }
    let mut target = Endpoint::from_shared(endpoint.clone())
        .map_err(|error| refused(error.to_string()))?
        .timeout(settings.timeout);
    if let Some(path) = &settings.certificate {
        let pem =
            fs::read(path).map_err(|error| refused(format!("{}: {error}", path.display())))?;
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
        target = target
            .tls_config(tls)
            .map_err(|error| refused(error.to_string()))?;
    }
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_channel(target.connect_lazy())
        .with_timeout(settings.timeout)
        .build()
        .map_err(|error| refused(error.to_string()))?;
    let attributes = settings.attributes.iter();
    let resource = Resource::builder()
        .with_attributes(attributes.map(|(key, value)| KeyValue::new(key.clone(), value.clone())))
        .with_service_name(settings.service.clone())
        .build();
    Ok(Some(
        SdkTracerProvider::builder()
            .with_batch_exporter(Reporting {
                exporter,
                failing: AtomicBool::new(false),
            })
            .with_resource(resource)
            .build(),
    ))
}

/// Logs once that spans do not arrive, and once that they do again: a wrong endpoint must be seen,
/// and a collector that is down for a day must not fill the log.
#[derive(Debug)]
struct Reporting<E> {
    exporter: E,
    failing: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for Reporting<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let outcome = self.exporter.export(batch).await;
        let failed_before = self.failing.swap(outcome.is_err(), Ordering::Relaxed);
        match &outcome {
            Err(error) if !failed_before => {
                tracing::warn!(
                    %error,
                    "spans are not exported; correct OTEL_EXPORTER_OTLP_ENDPOINT or start the \
                     collector",
                );
            }
            Ok(()) if failed_before => tracing::info!("spans are exported again"),
            _ => {}
        }
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: std::time::Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
