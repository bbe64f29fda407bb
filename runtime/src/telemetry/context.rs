//! Trace context as text, in the form of W3C Trace Context (`00-TRACE-SPAN-FLAGS`): it travels in
//! frames, in annotations of records and in the `TRACEPARENT` variable of a CNI call.

use std::fmt;
use std::str::FromStr;

use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The context of one span. It is a value that a record can carry, also through a process that
/// exports nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Traceparent {
    trace: TraceId,
    span: SpanId,
    flags: TraceFlags,
}

/// A text is not a traceparent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "traceparent {0:?}: must be 00-, 32 hex digits, -, 16 hex digits, -, 2 hex digits, neither id \
     all zero"
)]
pub struct TraceparentError(String);

impl Traceparent {
    fn from_context(context: &SpanContext) -> Option<Self> {
        context.is_valid().then(|| Self {
            trace: context.trace_id(),
            span: context.span_id(),
            flags: context.trace_flags(),
        })
    }

    fn context(self) -> SpanContext {
        SpanContext::new(self.trace, self.span, self.flags, true, TraceState::NONE)
    }

    /// The trace, as its 32 hex digits: what a person searches for.
    pub fn trace_id(self) -> String {
        self.trace.to_string()
    }
}

impl FromStr for Traceparent {
    type Err = TraceparentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = || {
            let mut parts = text.split('-');
            let version = hex(parts.next()?, 2)?;
            let trace = TraceId::from_hex(hex(parts.next()?, 32)?).ok()?;
            let span = SpanId::from_hex(hex(parts.next()?, 16)?).ok()?;
            let flags = u8::from_str_radix(hex(parts.next()?, 2)?, 16).ok()?;
            // Later versions may append parts; version 00 has exactly four, and ff is forbidden.
            let rest = parts.next().is_some();
            let known = version != "ff" && !(version == "00" && rest);
            let valid = known && trace != TraceId::INVALID && span != SpanId::INVALID;
            let flags = TraceFlags::new(flags) & TraceFlags::SAMPLED;
            valid.then_some(Self { trace, span, flags })
        };
        parsed().ok_or_else(|| TraceparentError(text.to_owned()))
    }
}

impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "00-{}-{}-{:02x}",
            self.trace,
            self.span,
            self.flags.to_u8()
        )
    }
}

impl fmt::Debug for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn hex(part: &str, digits: usize) -> Option<&str> {
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (part.len() == digits && part.bytes().all(lower)).then_some(part)
}

/// Returns the context of the current span; none where nothing is recorded.
pub fn current() -> Option<Traceparent> {
    of(&Span::current())
}

/// Returns the context of `span`, to send to another process; none where nothing is recorded.
pub fn of(span: &Span) -> Option<Traceparent> {
    Traceparent::from_context(span.context().span().span_context())
}

/// Makes `span`, which must not have been entered yet, part of the trace that `parent` belongs to.
pub fn set_parent(span: &Span, parent: Traceparent) {
    // Refused only if the span has started already or is not recorded: then there is nothing to
    // continue.
    let _ = span.set_parent(Context::new().with_remote_span_context(parent.context()));
}

/// Links `span` to `cause`, where there are several causes and so no single parent.
pub fn add_link(span: &Span, cause: Traceparent) {
    span.add_link(cause.context());
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt;

    const TEXT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn text_forms() {
        let same = [
            TEXT,
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        ];
        for text in same {
            assert_eq!(
                text.parse::<Traceparent>()
                    .map(|t| t.to_string())
                    .as_deref(),
                Ok(text)
            );
        }
        let later = "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-comes";
        assert_eq!(
            later
                .parse::<Traceparent>()
                .map(|t| t.to_string())
                .as_deref(),
            Ok(TEXT)
        );
        let refused = [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1",
        ];
        for text in refused {
            assert_eq!(
                text.parse::<Traceparent>(),
                Err(TraceparentError(text.to_owned()))
            );
        }
    }

    #[test]
    fn a_span_continues_what_it_was_given() {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            let parent: Traceparent = TEXT.parse().expect("valid");
            let span = tracing::info_span!("child");
            set_parent(&span, parent);
            let child = of(&span).expect("recorded");
            assert_eq!(child.trace_id(), parent.trace_id());
            assert_ne!(child, parent);
            let inside = span.in_scope(current).expect("recorded");
            assert_eq!(inside, child);
            let again: Traceparent = child.to_string().parse().expect("what is written parses");
            assert_eq!(again, child);
        });
    }

    #[test]
    fn nothing_is_made_up_where_nothing_is_recorded() {
        let span = tracing::info_span!("unrecorded");
        set_parent(&span, TEXT.parse().expect("valid"));
        assert_eq!(of(&span), None);
        assert_eq!(current(), None);
    }
}
