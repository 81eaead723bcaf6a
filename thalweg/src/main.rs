//! See the library.

use std::process::ExitCode;

/// What glibc's allocator is told, unless somebody has told it something already. By default it gives the
/// memory of every large message back to the kernel, which fills it with zeros for the next one; keeping it
/// saves a fifth of all CPU time under load (see ARCHITECTURE.md). It reads this only when a process starts.
const ALLOCATOR: [(&str, &str); 3] = [
    // Blocks below 32 MiB come from the heap.
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
    // As much as that may lie idle at the end of the heap.
    ("MALLOC_TRIM_THRESHOLD_", "67108864"),
    ("MALLOC_TOP_PAD_", "4194304"),
];

/// Starts this program anew in the same process, with [`ALLOCATOR`] in its environment. Returns where that
/// has happened already, or cannot: then everything works, only slower.
fn keep_memory() {
    use std::os::unix::process::CommandExt as _;
    if !cfg!(target_env = "gnu") || ALLOCATOR.iter().any(|(name, _)| std::env::var_os(name).is_some()) {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let mut args = std::env::args_os();
    let mut command = std::process::Command::new(program);
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    // Only returns when it fails.
    let _ = command.args(args).envs(ALLOCATOR).exec();
}

fn main() -> ExitCode {
    keep_memory();
    thalweg_broker::stage::arm();
    let cli = thalweg::cli::Cli::read();
    let json = cli.json();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(thalweg::cli::report(&error, json)),
    }
}
