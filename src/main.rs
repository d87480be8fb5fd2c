//! The program `sangam`: the daemon and the commands that ask it.

use std::process::ExitCode;

use clap::Parser;
use sangam::cli::{self, Args, Command};
use sangam::demo;

/// Gives back what is free after a burst, which the C library keeps. SQLite and zstd use it as well.
/// (Not in debug builds: `libfaketime`, by which the storm sets their clocks wrong, hangs with it.)
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(debug_assertions)))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let json = args.json;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(async {
        match args.command {
            Command::Demo { once, dir } => Box::pin(demo::run(demo::Options { once, dir })).await,
            _ => Ok(Box::pin(cli::run(args))
                .await
                .unwrap_or_else(|failure| failure.report(json))),
        }
    });
    // Work on blocking threads (a DNS lookup that hangs) must not keep the process from ending.
    runtime.shutdown_background();
    code
}
