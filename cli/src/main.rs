//! The `latile` command.
//!
//! Lives here: arguments ([`args`], and a module for each command in [`command`]), picture files
//! ([`picture`]), progress, messages and exit codes. Never here: networks, kernels, importers, or anything
//! that a program other than this command could want.
#![forbid(unsafe_code)]

mod args;
mod bundled;
mod command;
mod console;
mod exit;
mod interrupt;
mod memory;
mod output;
mod picture;
mod progress;
mod tensors;

use exit::Exit;
use std::process::ExitCode;

fn main() -> ExitCode {
    latile_cpu::allocator::give_back_large_blocks();
    let code = match args::parse(std::env::args_os()) {
        args::Parsed::Run(command) => run(*command),
        args::Parsed::Show(text) => finish(console::say(text.trim_end()).map_err(Into::into)),
        args::Parsed::Wrong(text) => {
            console::remark(text.trim_end());
            Exit::Usage
        }
    };
    ExitCode::from(code as u8)
}

fn run(command: args::Command) -> Exit {
    finish(
        console::start_log()
            .map_err(Into::into)
            .and_then(|()| Ok(interrupt::Interrupt::install()?))
            .and_then(|interrupt| command::run(command, &interrupt)),
    )
}

fn finish(result: anyhow::Result<()>) -> Exit {
    match result {
        Ok(()) => Exit::Done,
        Err(e) => {
            let code = exit::classify(&e);
            // As programs that a closed pipe ends: `head` wants no explanation.
            if code != Exit::PipeClosed {
                console::remark(&format!("latile: {}", exit::message(&e)));
            }
            code
        }
    }
}
