//! boost.context by its two symbols: Debian's library, and the same assembly without FP control.

use super::Run;

/// The round trip and the reuse of a stack, or why there is neither.
pub type Stubs = Result<(fn() -> Run, fn() -> Run), &'static str>;

#[cfg_attr(not(any(boost, boost_without_fp)), allow(unused_macros))]
macro_rules! fcontext {
    ($(#[$doc:meta])* $module:ident: $jump:ident, $make:ident) => {
        $(#[$doc])*
        pub mod $module {
            use crate::subjects::fcontext::Room;
            use crate::subjects::{ROOM, Run};
            use std::ffi::c_void;
            use std::hint::black_box;

            /// Where control came from, and what it brought.
            #[repr(C)]
            struct Transfer {
                from: *mut c_void,
                data: usize,
            }

            unsafe extern "C" {
                fn $jump(to: *mut c_void, data: usize) -> Transfer;
                fn $make(top: *mut u8, size: usize, entry: extern "C" fn(Transfer) -> !) -> *mut c_void;
            }

            extern "C" fn echo(mut transfer: Transfer) -> ! {
                loop {
                    // SAFETY: the one that jumped here waits where it says.
                    transfer = unsafe { $jump(transfer.from, transfer.data) };
                }
            }

            /// The symbol called in a loop, on both sides.
            pub fn stub() -> Run {
                let room = Room::new();
                // SAFETY: the stack is `room`'s, which lives as long as the closure.
                let mut context = unsafe { $make(room.top(), ROOM, echo) };
                Box::new(move |rounds| {
                    let _stack = &room;
                    for round in 0..rounds {
                        // SAFETY: the context of the last transfer is the one that waits.
                        let transfer = unsafe { $jump(context, black_box(round as usize)) };
                        context = transfer.from;
                        black_box(transfer.data);
                    }
                })
            }

            /// A new context on the same stack each time, entered once and left.
            pub fn reused() -> Run {
                let room = Room::new();
                Box::new(move |rounds| {
                    for round in 0..rounds {
                        // SAFETY: the stack is free again: the context that was on it is never resumed.
                        let transfer = unsafe { $jump($make(room.top(), ROOM, echo), black_box(round as usize)) };
                        black_box(transfer.data);
                    }
                })
            }
        }
    };
}

#[cfg(boost)]
fcontext! {
    /// As Debian builds it: MXCSR and the x87 control word are kept.
    kept: boost_jump, boost_make
}
#[cfg(boost_without_fp)]
fcontext! {
    /// Built with `BOOST_USE_TSX`: they are not.
    not_kept: boost_without_fp_jump, boost_without_fp_make
}

/// Debian's library, which keeps MXCSR and the x87 control word.
#[cfg(boost)]
pub const DEBIAN: Stubs = Ok((kept::stub, kept::reused));
#[cfg(not(boost))]
pub const DEBIAN: Stubs = Err("not built in: apt-get install libboost-context-dev, and build on x86-64");

/// The same assembly built with `BOOST_USE_TSX`, boost's word for leaving both out.
#[cfg(boost_without_fp)]
pub const WITHOUT_FP: Stubs = Ok((not_kept::stub, not_kept::reused));
#[cfg(not(boost_without_fp))]
pub const WITHOUT_FP: Stubs = Err("not built in: its assembly comes with the crate context, for x86-64");

/// A stack for a library that leaves that to its user. No guard: nothing here runs deep.
#[cfg(any(boost, boost_without_fp))]
struct Room(Box<[Line]>);

#[cfg(any(boost, boost_without_fp))]
#[repr(align(64))]
#[derive(Clone, Copy)]
#[expect(dead_code, reason = "its size and alignment are what counts")]
struct Line([u8; 64]);

#[cfg(any(boost, boost_without_fp))]
impl Room {
    fn new() -> Self {
        Room(vec![Line([0; 64]); super::ROOM / 64].into())
    }

    /// One past the last byte; aligned to 64.
    fn top(&self) -> *mut u8 {
        self.0.as_ptr_range().end.cast_mut().cast()
    }
}
