//! A word on stderr about anything that takes longer than two seconds.

use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(2);

struct State {
    case: &'static str,
    last: Instant,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

/// A case begins.
pub fn begin(case: &'static str) {
    *STATE.lock().expect("nobody panics with it") = Some(State { case, last: Instant::now() });
}

/// Says how far the case is, if it has been silent for long enough.
pub fn tick(what: &str) {
    let mut state = STATE.lock().expect("nobody panics with it");
    if let Some(state) = state.as_mut()
        && state.last.elapsed() >= INTERVAL
    {
        state.last = Instant::now();
        let _ = writeln!(std::io::stderr(), "{}: {what}", state.case);
    }
}
