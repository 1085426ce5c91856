//! Walk, plan and picture over words and pieces that anybody has written: a specimen, scribbled on, with claims about its pieces.
//! [`Specimen::scan`] panics when one of them writes, or takes for a frame what is not in the segment; what oversteps it, AddressSanitizer sees.

#![no_main]

use cfi_stack::specimen::{Design, Specimen};
use cfi_stack_fuzz::picker;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut pick = picker(data);
    let design = Design::choose(&mut pick);
    Specimen::make(&design).expect("a chosen design is a possible one").scan(&mut pick);
});
