//! Conversion of settings, made from the rows of [`margay_api::felix_settings`]. A setting without
//! a field of its name in `sync.proto`, or a field without a setting, does not compile.

use margay_api::rule::Protocol;
use margay_api::settings::{EndpointToHostAction, Failsafe, FelixSettings, LogRate, TimeUnit};

use super::fields::{RANGE, decode_byte, decode_port, out_of_range, parse, unknown_kind};
use super::{Error, wire};

/// Form of a setting's type on the wire.
trait Wire<W>: Sized {
    fn encode(&self) -> W;

    /// `default` stands for what an older server does not send.
    fn decode(value: W, field: &'static str, default: Self) -> Result<Self, Error>;
}

macro_rules! conversions {
    ($($group:ident { $($(#[$doc:meta])+ $name:ident: $kind:ty = $default:expr;)* })*) => {
        pub(super) fn encode_settings(settings: &FelixSettings) -> wire::Settings {
            wire::Settings { $($($name: Wire::encode(&settings.$name),)*)* }
        }

        pub(super) fn decode_settings(value: wire::Settings) -> Result<FelixSettings, Error> {
            let default = FelixSettings::default();
            Ok(FelixSettings {
                $($($name: Wire::decode(
                    value.$name,
                    concat!("settings.", stringify!($name)),
                    default.$name,
                )?,)*)*
            })
        }
    };
}

margay_api::felix_settings!(conversions);

impl Wire<Self> for u32 {
    fn encode(&self) -> Self {
        *self
    }

    fn decode(value: Self, _: &'static str, _: Self) -> Result<Self, Error> {
        Ok(value)
    }
}

/// No such setting may be 0, so 0 is what an older server does not send.
impl Wire<u32> for u16 {
    fn encode(&self) -> u32 {
        (*self).into()
    }

    fn decode(value: u32, field: &'static str, default: Self) -> Result<Self, Error> {
        if value == 0 {
            Ok(default)
        } else {
            decode_port(field, value)
        }
    }
}

impl Wire<Self> for bool {
    fn encode(&self) -> Self {
        *self
    }

    fn decode(value: Self, _: &'static str, _: Self) -> Result<Self, Error> {
        Ok(value)
    }
}

impl Wire<Self> for String {
    fn encode(&self) -> Self {
        self.clone()
    }

    fn decode(value: Self, _: &'static str, _: Self) -> Result<Self, Error> {
        Ok(value)
    }
}

impl Wire<i32> for EndpointToHostAction {
    fn encode(&self) -> i32 {
        let value = match self {
            Self::Drop => wire::EndpointToHost::Drop,
            Self::Accept => wire::EndpointToHost::Accept,
            Self::Return => wire::EndpointToHost::Return,
        };
        value.into()
    }

    fn decode(value: i32, field: &'static str, _: Self) -> Result<Self, Error> {
        match wire::EndpointToHost::try_from(value) {
            Ok(wire::EndpointToHost::Drop) => Ok(Self::Drop),
            Ok(wire::EndpointToHost::Accept) => Ok(Self::Accept),
            Ok(wire::EndpointToHost::Return) => Ok(Self::Return),
            Ok(wire::EndpointToHost::Unspecified) | Err(_) => Err(unknown_kind(field)),
        }
    }
}

impl Wire<Option<wire::LogRate>> for Option<LogRate> {
    fn encode(&self) -> Option<wire::LogRate> {
        self.map(|rate| wire::LogRate {
            count: rate.count.into(),
            unit: encode_time_unit(rate.unit),
        })
    }

    fn decode(value: Option<wire::LogRate>, _: &'static str, _: Self) -> Result<Self, Error> {
        value.map(decode_log_rate).transpose()
    }
}

impl Wire<Option<wire::Failsafes>> for Vec<Failsafe> {
    fn encode(&self) -> Option<wire::Failsafes> {
        let ports = self.iter().map(
            |Failsafe {
                 protocol,
                 port,
                 net,
             }| wire::Failsafe {
                protocol: protocol.0.into(),
                port: (*port).into(),
                net: net.map(|net| net.to_string()).unwrap_or_default(),
            },
        );
        Some(wire::Failsafes {
            ports: ports.collect(),
        })
    }

    fn decode(
        value: Option<wire::Failsafes>,
        _: &'static str,
        default: Self,
    ) -> Result<Self, Error> {
        let Some(value) = value else {
            return Ok(default);
        };
        value.ports.into_iter().map(decode_failsafe).collect()
    }
}

fn decode_failsafe(value: wire::Failsafe) -> Result<Failsafe, Error> {
    Ok(Failsafe {
        protocol: decode_byte("failsafe.protocol", value.protocol).map(Protocol)?,
        port: decode_port("failsafe.port", value.port)?,
        net: match value.net.as_str() {
            "" => None,
            net => Some(parse("failsafe.net", net, RANGE)?),
        },
    })
}

fn decode_log_rate(value: wire::LogRate) -> Result<LogRate, Error> {
    let unit = match value.unit() {
        wire::TimeUnit::Second => TimeUnit::Second,
        wire::TimeUnit::Minute => TimeUnit::Minute,
        wire::TimeUnit::Hour => TimeUnit::Hour,
        wire::TimeUnit::Day => TimeUnit::Day,
        wire::TimeUnit::Unspecified => return Err(unknown_kind("settings.log_rate.unit")),
    };
    match u16::try_from(value.count) {
        Ok(count) if count > 0 => Ok(LogRate { count, unit }),
        _ => Err(out_of_range(
            "settings.log_rate.count",
            value.count,
            "1..=65535",
        )),
    }
}

fn encode_time_unit(value: TimeUnit) -> i32 {
    let value = match value {
        TimeUnit::Second => wire::TimeUnit::Second,
        TimeUnit::Minute => wire::TimeUnit::Minute,
        TimeUnit::Hour => wire::TimeUnit::Hour,
        TimeUnit::Day => wire::TimeUnit::Day,
    };
    value.into()
}
