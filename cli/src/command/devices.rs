//! `latile devices`: what there is to run on.

use crate::console::{say, say_json};
use argh::FromArgs;
use latile_runtime::backend::Backend;

/// Lists what models can run on here, and what each can do.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "devices", help_triggers("-h", "--help"))]
pub(crate) struct Args {
    /// print one JSON object
    #[argh(switch)]
    pub(crate) json: bool,
}

#[derive(serde::Serialize)]
struct Report {
    devices: Vec<Device>,
}

#[derive(serde::Serialize)]
struct Device {
    backend: String,
    device: String,
    usable: bool,
    why_not: Option<String>,
    details: Vec<String>,
}

/// Lists and prints.
///
/// # Errors
/// Where stdout cannot be written, or the CPU cannot be used as `LATILE_ISA` asks.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let info = super::cpu(None)?.info();
    let device = Device {
        backend: info.backend,
        device: info.device,
        usable: info.usable.is_ok(),
        why_not: info.usable.err(),
        details: info.details,
    };
    if args.json {
        return say_json(&Report { devices: vec![device] });
    }
    let mut text = format!("{}  {}", device.backend, device.device);
    if let Some(why) = &device.why_not {
        text.push_str(&format!("\n     cannot be used: {why}"));
    }
    for line in &device.details {
        text.push_str(&format!("\n     {line}"));
    }
    Ok(say(&text)?)
}
