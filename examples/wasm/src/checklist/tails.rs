//! Tail calls, in frames that own and pop their stack arguments: after growth, with more, fewer and as many of them as came in, with
//! results in a frame further up, and without end in constant room.

use super::calls::{passing, returning};
use super::values::{KINDS, Kind, in_turn, types};
use super::watch::{SEGMENT, STEP, watched};
use super::{Bench, Item, Program, holds};

pub const ITEMS: &[Item] = &[
    ("tail/ten-results", ten_results),
    ("tail/results-on-the-stack", results_on_the_stack),
    ("tail/calls-with-arguments", calls_with_arguments),
    ("tail/arguments", arguments),
    ("tail/arguments-on-an-edge", arguments_on_an_edge),
    ("tail/return_call", |bench| constant(bench, "call")),
    ("tail/return_call_indirect", |bench| constant(bench, "indirect")),
    ("tail/return_call_ref", |bench| constant(bench, "reference")),
    ("tail/growth-between", growth_between),
    ("tail/between-modules", between_modules),
];

/// What the frames of a module own of arguments; its tail calls must have gone to such.
fn area(program: &Program<'_>) -> Result<u32, String> {
    let bytes = program.store.largest_argument_area();
    holds(bytes > 0, || "no function owns its stack arguments".to_owned())?;
    Ok(bytes)
}

/// `a` makes the stack grow, then makes a tail call to `b`, whose ten results go to the caller of `a`.
fn ten_results(bench: &Bench<'_>) -> Result<String, String> {
    let kinds = in_turn(&KINDS, 2);
    let list = types(&kinds);
    let values: String = kinds
        .iter()
        .enumerate()
        .map(|(at, kind)| kind.sum(&kind.number(11 * at as i32), &kind.of("(local.get 0)")))
        .collect();
    let locals: String = kinds.iter().enumerate().map(|(at, kind)| format!("(local $r{at} {})", kind.0)).collect();
    let mut check = String::new();
    for (at, kind) in kinds.iter().enumerate().rev() {
        let must = kind.sum(&kind.number(11 * at as i32), &kind.of("(local.get $depth)"));
        let differ = kind.differ(&format!("(local.get $r{at})"), &must);
        check.push_str(&format!("(local.set $r{at}) (if {differ} (then (return (i64.const {at}))))"));
    }
    let text = format!(
        "(module
            (func $deep (param i32) (result i32)
                (if (result i32) (local.get 0)
                    (then (i32.add (i32.const 1) (call $deep (i32.sub (local.get 0) (i32.const 1)))))
                    (else (i32.const 0))))
            (func $a (param i32) (result {list}) (return_call $b (call $deep (local.get 0)) (i64.const 5)))
            (func $b (param i32 i64) (result {list})
                (if (i32.ne (call $deep (i32.mul (local.get 0) (i32.const 4))) (i32.mul (local.get 0) (i32.const 4)))
                    (then unreachable))
                {values})
            (func (export \"run\") (param $depth i32) (result i64) {locals}
                (call $a (local.get $depth))
                {check}
                (i64.const -1)))"
    );
    let mut program = bench.load(&text)?;
    let depth = bench.depth(500, 120);
    let stats = program.expect("run", &[depth], -1)?;
    holds(stats.growths > 1, || "growth in both was wanted".to_owned())?;
    Ok(format!("ten results of five kinds, {} growths", stats.growths))
}

/// A recursion each level of which has forty results of five kinds in the frame of its caller, which looks at every one: all
/// these frames move while pointers to them wait in younger ones. It is entered by tail call.
fn results_on_the_stack(bench: &Bench<'_>) -> Result<String, String> {
    let kinds = in_turn(&KINDS, 8);
    let list = types(&kinds);
    let text = returning(&kinds).replace(
        "(func (export \"run\")",
        &format!("(func $turn (param i32) (result {list}) (return_call $deep (local.get 0))) (func (export \"run\")"),
    );
    let text = text.replace("(call $deep (local.get $depth))\n", "(call $turn (local.get $depth))\n");
    // Twice without a branch between: what optimisation would make one address of must not be kept across the first call.
    let Some(call) = text.find("(call $turn") else {
        return Err("the recursion is not entered by tail call".to_owned());
    };
    let drops = "drop ".repeat(kinds.len());
    let text = format!("{}(call $turn (local.get $depth)) {drops}{}", &text[..call], &text[call..]);
    let mut program = bench.load(&text)?;
    let (depth, mut stack) = (bench.depth(400, 60), program.stack()?);
    for depth in [0, depth, 1, depth] {
        program.expect_on(&mut stack, "run", &[depth], -1)?;
    }
    let growths = stack.stats().growths;
    holds(growths > 2, || format!("{growths} growths"))?;
    Ok(format!("{} results, depth {depth}, {growths} growths", kinds.len()))
}

/// Ordinary calls, between functions that pop what they are called with.
fn calls_with_arguments(bench: &Bench<'_>) -> Result<String, String> {
    let text = passing(&KINDS)
        .replace("(func (export \"twice\")", "(func $tail (return_call $tail)) (func (export \"twice\")");
    let mut program = bench.load(&text)?;
    let (depth, mut stack) = (bench.depth(300, 80), program.stack()?);
    for depth in [60, depth] {
        program.expect_on(&mut stack, "twice", &[depth], i64::from(depth) + 1)?;
    }
    let growths = stack.stats().growths;
    Ok(format!("50 arguments, {} bytes of them on the stack, depth {depth}, {growths} growths", area(&program)?))
}

/// The parameters of the functions that call each other in turn: more on the stack, as many, fewer, none.
const COUNTS: [usize; 6] = [2, 31, 31, 17, 25, 1];

/// `run(shift, depth)`: `shift` frames of sixteen bytes, then a chain of tail calls between functions with so many arguments of five
/// kinds. Each compares every argument with what it must be and hands on what it got. −1, or what was wrong.
fn handing_on() -> String {
    let base = |at: usize| 100 + 13 * at as i32;
    let mut functions = String::new();
    for (place, count) in COUNTS.iter().enumerate() {
        let kinds: Vec<Kind> = KINDS.iter().copied().cycle().take(*count).collect();
        let params: String = kinds.iter().enumerate().map(|(at, kind)| format!("(param $a{at} {})", kind.0)).collect();
        let check: String = (kinds.iter().enumerate())
            .map(|(at, kind)| {
                let must = kind.sum(&kind.number(base(at)), &kind.of("(local.get $depth)"));
                let differ = kind.differ(&format!("(local.get $a{at})"), &must);
                format!("(if {differ} (then (return (i64.const {}))))", 1000 * place + at)
            })
            .collect();
        let next = match COUNTS.get(place + 1) {
            Some(next) => {
                let hand_on = |at: usize| {
                    let kind = KINDS[at % KINDS.len()];
                    // The argument of the same kind that came in, if there is one, moved by what their numbers differ in.
                    let from = at % KINDS.len() + (at / KINDS.len()) % count.div_ceil(KINDS.len()) * KINDS.len();
                    if from < *count {
                        kind.sum(&format!("(local.get $a{from})"), &kind.number(base(at) - base(from)))
                    } else {
                        kind.sum(&kind.number(base(at)), &kind.of("(local.get $depth)"))
                    }
                };
                let args: String = (0..*next).map(hand_on).collect();
                format!("(return_call $f{} (local.get $depth) {args})", place + 1)
            }
            None => "(i64.const -1)".to_owned(),
        };
        functions.push_str(&format!("(func $f{place} (param $depth i32) {params} (result i64) {check} {next})"));
    }
    let first: String = (0..COUNTS[0])
        .map(|at| {
            let kind = KINDS[at % KINDS.len()];
            kind.sum(&kind.number(base(at)), &kind.of("(local.get $depth)"))
        })
        .collect();
    format!(
        "(module
            {functions}
            (func $shift (param $left i32) (param $depth i32) (result i64)
                (if (i32.eqz (local.get $left)) (then (return (call $f0 (local.get $depth) {first}))))
                (i64.mul (i64.const 1) (call $shift (i32.sub (local.get $left) (i32.const 1)) (local.get $depth))))
            (func (export \"run\") (param $shift i32) (param $depth i32) (result i64)
                (call $shift (local.get $shift) (local.get $depth))))"
    )
}

/// Every start of such a chain over one segment: the edge cuts its frames and their argument areas at every offset.
fn arguments_on_an_edge(bench: &Bench<'_>) -> Result<String, String> {
    let mut program = bench.load(&handing_on())?;
    let offsets = SEGMENT / STEP;
    let seen = watched(|| {
        bench
            .sweep(offsets)
            .try_for_each(|shift| program.expect("run", &[shift as i32, shift as i32 + 3], -1).map(|_| ()))
    })?;
    holds(seen.growths > 0, || "the stack never grew".to_owned())?;
    Ok(format!(
        "{COUNTS:?} arguments in turn, up to {} bytes of them on the stack, {}, {} growths at {} offsets",
        area(&program)?,
        bench.swept(offsets, "starts"),
        seen.growths,
        seen.offsets.len()
    ))
}

/// Tail calls from few arguments to many, which do not fit registers, to few again, with growth in each function and a frame of
/// the caller below that lives on.
fn arguments(bench: &Bench<'_>) -> Result<String, String> {
    let mut functions = String::new();
    let counts = [1, 14, 0, 9, 40, 2, 11, 12, 13, 1];
    for (at, count) in counts.iter().enumerate() {
        let params: String = (0..*count).map(|_| "(param i64)").collect();
        let sum: String = (0..*count).map(|param| format!("(local.get {param}) i64.add ")).collect();
        let next = match counts.get(at + 1) {
            Some(next) => {
                let args: String = (0..*next).map(|arg| format!("(i64.const {})", arg + at as i64)).collect();
                format!("{args} (return_call $f{})", at + 1)
            }
            None => "(global.get $sum)".to_owned(),
        };
        functions.push_str(&format!(
            "(func $f{at} {params} (result i64)
                (global.get $sum) {sum} (global.set $sum)
                (global.set $sum (i64.add (global.get $sum)
                    (call $deep (i32.add (i32.const {}) (global.get $depth)))))
                {next})",
            40 * at,
        ));
    }
    let text = format!(
        "(module
            (global $sum (mut i64) (i64.const 0))
            (global $depth (mut i32) (i32.const 0))
            (func $deep (param i32) (result i64)
                (if (result i64) (local.get 0)
                    (then (i64.add (i64.const 1) (call $deep (i32.sub (local.get 0) (i32.const 1)))))
                    (else (i64.const 0))))
            {functions}
            (func $below (param i32) (result i64)
                (if (result i64) (local.get 0)
                    (then (i64.add (i64.const 1000000) (call $below (i32.sub (local.get 0) (i32.const 1)))))
                    (else (call $f0 (i64.const 3)))))
            (func (export \"run\") (param i32) (param i32) (result i64)
                (global.set $sum (i64.const 0))
                (global.set $depth (local.get 1))
                (call $below (local.get 0))))"
    );
    let mut program = bench.load(&text)?;
    let given = |at: usize| (0..counts[at]).map(|arg| arg + at as i64 - 1).sum::<i64>();
    let mut growths = 0;
    let places = 24;
    for at in bench.sweep(places) {
        let (below, depth) = (7 * at as i32, bench.depth(40, 0));
        let deep: i64 = (0..counts.len() as i64).map(|at| 40 * at + i64::from(depth)).sum();
        let must = 3 + (1..counts.len()).map(given).sum::<i64>() + deep + 1_000_000 * i64::from(below);
        growths += program.expect("run", &[below, depth], must)?.growths;
    }
    holds(growths > 0, || "the stack did not grow".to_owned())?;
    Ok(format!("{counts:?} arguments in turn, {}, {growths} growths", bench.swept(places, "depths")))
}

/// A million tail calls in turn between functions with two and with sixteen arguments, in the first segment.
fn constant(bench: &Bench<'_>, how: &str) -> Result<String, String> {
    let zeros: String = (0..13).map(|at| format!("(f64.const {at})")).collect();
    let floats = "(param f64)".repeat(13);
    // Operators that take what is on the stack, and what they take besides the arguments.
    let (to_many, to_few) = match how {
        "call" => ("return_call $many", "return_call $few"),
        "indirect" => ("(i32.const 1) return_call_indirect (type $m)", "(i32.const 0) return_call_indirect (type $f)"),
        _ => ("(ref.func $many) return_call_ref $m", "(ref.func $few) return_call_ref $f"),
    };
    let text = format!(
        "(module
            (type $f (func (param i32 i64) (result i64)))
            (type $m (func (param i64 i32) (param i64) {floats} (result i64)))
            (table funcref (elem $few $many))
            (func $few (type $f)
                (if (i32.eqz (local.get 0)) (then (return (local.get 1))))
                (i64.add (local.get 1) (i64.const 1)) (i32.sub (local.get 0) (i32.const 1)) (i64.const 1) {zeros}
                {to_many})
            (func $many (type $m)
                (if (i32.eqz (local.get 1)) (then (return (local.get 0))))
                (i32.sub (local.get 1) (i32.const 1)) (i64.add (local.get 0) (local.get 2))
                {to_few})
            (func (export \"run\") (param i32) (result i64) (call $few (local.get 0) (i64.const 0))))"
    );
    let mut program = bench.load(&text)?;
    let calls = match (bench.always(), bench.every) {
        (false, 1) => 1_000_000,
        // One of the three, as a move takes twenty microseconds.
        (true, 1) if how == "call" => 1_000_000,
        (false, _) => 20_000,
        (true, _) => 1_000,
    };
    let stats = program.expect("run", &[calls], calls.into())?;
    let first = bench.config.policy.initial as u64;
    holds(stats.largest == first, || format!("{calls} tail calls took {} bytes of stack", stats.largest))?;
    let area = area(&program)?;
    Ok(format!("{calls} tail calls in {first} bytes, {area} bytes of arguments in a frame, {} moves", stats.growths))
}

/// A chain of tail calls each link of which goes deep first and comes back, deeper each time.
fn growth_between(bench: &Bench<'_>) -> Result<String, String> {
    let text = "(module
        (func $deep (param i32) (result i64)
            (if (result i64) (local.get 0)
                (then (i64.add (i64.const 1) (call $deep (i32.sub (local.get 0) (i32.const 1)))))
                (else (i64.const 0))))
        (func $link (export \"run\") (param $links i32) (result i64)
            (return_call $carry (local.get $links) (i64.const 0) (f32.const 0.5)))
        (func $carry (param $links i32) (param $sum i64) (param f32) (result i64)
            (if (i32.eqz (local.get $links)) (then (return (local.get $sum))))
            (return_call $carry
                (i32.sub (local.get $links) (i32.const 1))
                (i64.add (local.get $sum) (call $deep (i32.mul (i32.sub (i32.const 40) (local.get $links)) (i32.const 17))))
                (local.get 2))))";
    let mut program = bench.load(text)?;
    let links: i32 = if bench.always() { 8 } else { 40 };
    let must = (1..=links).map(|left| 17 * i64::from(40 - left)).sum();
    let stats = program.expect("run", &[links], must)?;
    holds(stats.growths > 0, || "the stack did not grow".to_owned())?;
    Ok(format!("{links} links, {} growths", stats.growths))
}

/// Tail calls to functions of another module: of one without tail calls, whose functions own no arguments, of one with, and of the host; named
/// and by reference. All that is called so makes the stack grow.
fn between_modules(bench: &Bench<'_>) -> Result<String, String> {
    const ARGUMENTS: usize = 13;
    let (params, sum): (String, String) =
        (1..=ARGUMENTS).map(|at| (" i64", format!("(local.get {at}) i64.add "))).unzip();
    let list: String = (1..=ARGUMENTS).map(|at| format!("(i64.const {at})")).collect();
    let plain = format!(
        "(module
            (func $count (export \"count\") (param i32) (result i64)
                (if (result i64) (local.get 0)
                    (then (i64.add (i64.const 1) (call $count (i32.sub (local.get 0) (i32.const 1)))))
                    (else (i64.const 0))))
            (func (export \"many\") (param i32 {params}) (result i64 f64)
                (call $count (local.get 0)) {sum} (f64.const 0.5)))"
    );
    let tails = "(module
        (import \"earlier\" \"count\" (func $count (param i32) (result i64)))
        (func $spin (export \"spin\") (param i32) (result i64)
            (if (i32.lt_u (local.get 0) (i32.const 1000000)) (then
                (return_call $spin (i32.add (local.get 0) (i32.const 1000000)))))
            (return_call $count (i32.sub (local.get 0) (i32.const 1000000)))))";
    let both = "(local.set $float) (if (f64.ne (local.get $float) (f64.const 0.5)) (then (return (i64.const 1))))
        (local.get $must) (if (i64.ne) (then (return (i64.const 2))))";
    let one = "(i64.extend_i32_u (local.get $depth)) (if (i64.ne) (then (return (i64.const 3))))";
    let text = format!(
        "(module
            (type $m (func (param i32 {params}) (result i64 f64)))
            (type $s (func (param i32) (result i64)))
            (import \"earlier\" \"many\" (func $many (type $m)))
            (import \"earlier\" \"spin\" (func $spin (type $s)))
            (import \"native\" \"within\" (func $within (param funcref i32) (result i64)))
            (table funcref (elem $many $spin))
            (elem declare func $spin $many)
            (func $many-named (param i32) (result i64 f64) (return_call $many (local.get 0) {list}))
            (func $many-listed (param i32) (result i64 f64)
                (return_call_indirect (type $m) (local.get 0) {list} (i32.const 0)))
            (func $many-referred (param i32) (result i64 f64)
                (return_call_ref $m (local.get 0) {list} (ref.func $many)))
            (func $spin-named (type $s) (return_call $spin (local.get 0)))
            (func $spin-listed (type $s) (return_call_indirect (type $s) (local.get 0) (i32.const 1)))
            (func $spin-referred (type $s) (return_call_ref $s (local.get 0) (ref.func $spin)))
            (func $native (type $s) (return_call $within (ref.func $spin) (local.get 0)))
            (func (export \"run\") (param $depth i32) (result i64) (local $must i64) (local $float f64)
                (local.set $must (i64.add (i64.const 91) (i64.extend_i32_u (local.get $depth))))
                (call $many-named (local.get $depth)) {both}
                (call $many-listed (local.get $depth)) {both}
                (call $many-referred (local.get $depth)) {both}
                (call $spin-named (local.get $depth)) {one}
                (call $spin-listed (local.get $depth)) {one}
                (call $spin-referred (local.get $depth)) {one}
                (call $native (local.get $depth)) {one}
                (i64.const -1)))"
    );
    let mut program = bench.load(&plain)?;
    holds(program.store.largest_argument_area() == 0, || "a module without tail calls has such frames".to_owned())?;
    program.add(tails)?;
    program.add(&text)?;
    let mut growths = 0;
    for depth in [0, bench.depth(400, 60), 1] {
        growths += program.expect("run", &[depth], -1)?.growths;
    }
    holds(growths > 0, || "the stack did not grow".to_owned())?;
    Ok(format!("7 ways out of a module, {} bytes of arguments in a frame, {growths} growths", area(&program)?))
}
