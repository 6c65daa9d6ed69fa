from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_ACCEPTED: _ClassVar[Status]
    STATUS_NON_FINITE: _ClassVar[Status]
    STATUS_WRONG_LENGTH: _ClassVar[Status]
    STATUS_WRONG_DTYPE: _ClassVar[Status]
    STATUS_WRONG_DIGEST: _ClassVar[Status]
    STATUS_MALFORMED: _ClassVar[Status]
    STATUS_DUPLICATE: _ClassVar[Status]
    STATUS_LATE: _ClassVar[Status]
    STATUS_WRONG_ROUND: _ClassVar[Status]
    STATUS_NOT_SELECTED: _ClassVar[Status]
    STATUS_TRUNCATED: _ClassVar[Status]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
STATUS_UNSPECIFIED: Status
STATUS_ACCEPTED: Status
STATUS_NON_FINITE: Status
STATUS_WRONG_LENGTH: Status
STATUS_WRONG_DTYPE: Status
STATUS_WRONG_DIGEST: Status
STATUS_MALFORMED: Status
STATUS_DUPLICATE: Status
STATUS_LATE: Status
STATUS_WRONG_ROUND: Status
STATUS_NOT_SELECTED: Status
STATUS_TRUNCATED: Status

class TensorSpec(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("tensors", "dtype")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    dtype: DType
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("client", "token")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    client: str
    token: bytes
    def __init__(self, client: _Optional[str] = ..., token: _Optional[bytes] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("session", "federation", "manifest", "task")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    federation: str
    manifest: Manifest
    task: str
    def __init__(self, session: _Optional[bytes] = ..., federation: _Optional[str] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., task: _Optional[str] = ...) -> None: ...

class RoundsRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    def __init__(self, session: _Optional[bytes] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("round", "seconds_left")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    round: int
    seconds_left: float
    def __init__(self, round: _Optional[int] = ..., seconds_left: _Optional[float] = ...) -> None: ...

class ModelRequest(_message.Message):
    __slots__ = ("session", "round")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    round: int
    def __init__(self, session: _Optional[bytes] = ..., round: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class SubmitHeader(_message.Message):
    __slots__ = ("session", "round", "dtype", "length", "digest", "examples")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    round: int
    dtype: DType
    length: int
    digest: bytes
    examples: int
    def __init__(self, session: _Optional[bytes] = ..., round: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., length: _Optional[int] = ..., digest: _Optional[bytes] = ..., examples: _Optional[int] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: SubmitHeader
    chunk: Chunk
    def __init__(self, header: _Optional[_Union[SubmitHeader, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("status", "reason")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    status: Status
    reason: str
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., reason: _Optional[str] = ...) -> None: ...
