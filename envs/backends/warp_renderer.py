"""Images and object ids of a MuJoCo model by ray casting on the CPU, for machines without a graphics card.

One pass gives both, several times faster than software OpenGL gives the image alone. The image is another one than
MuJoCo's own: no anti-aliasing, no reflections, and no shadows unless asked for. Physics is not touched.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np

from envs.choices import check_positive

GEOM, SITE, TENDON = 5, 6, 18  # mjtObj
VISIBLE_GROUPS = 3  # MuJoCo draws the groups 0, 1 and 2 unless told otherwise
TENDON_SEGMENTS = 40  # capsules per tendon: a slack one hangs in a curve of up to 31
START = 0.9  # where rays start, as a share of the depth that is free for sure
SKYBOX = 2  # mjtTexture
PLANE, CAPSULE = 0, 3  # mjtGeom
SIMPLE_SHAPES = (0, 2, 3, 4, 5, 6)  # plane, sphere, capsule, ellipsoid, cylinder, box


def import_warp() -> tuple[Any, Any]:
    """The modules `warp` and `mujoco_warp`.

    Raises:
        ImportError: they are not installed.
    """
    try:
        import warp

        warp.config.log_level = max(warp.config.log_level, warp.LOG_WARNING)  # else it lists every kernel that it loads
        import mujoco_warp
    except ImportError as error:
        raise ImportError(
            f"render backend 'mjwarp': {error}. Install it with pip install -e '.[warp]', or use backend 'mujoco'"
        ) from error
    return warp, mujoco_warp


def _import_mujoco() -> Any:
    """The module, whose types are not declared."""
    import mujoco

    return mujoco


class WarpRenderer:
    """Draws the current state of a `dm_control` physics with `mujoco_warp`.

    Geoms, sites and tendons are drawn as MuJoCo would: those of the visible groups that are not fully transparent.
    Poses are read anew for each image, and so are the fields of the model that tasks edit: sizes, colours and
    materials of geoms and sites, and the cameras. Textures, lights and meshes stay what they were at the first image.
    The first image of a model compiles its kernel in about ten seconds; the result is kept on disk
    (`WARP_CACHE_PATH`). What is partly transparent is drawn opaque.

    Args:
        physics: a `dm_control.mujoco.Physics`, which may be stepped and reset in between.

    Raises:
        ImportError: `mujoco_warp` is not installed.
        ValueError: the model has no camera, or it has a skin, which would not be drawn.

    Source: github.com/google-deepmind/mujoco_warp 3.17, `create_render_context`.
    Differs: sites and tendons are added to the scene; rays start near the first object, which makes the edges of small
        things far away as exact as those of MuJoCo; the sky is reduced to the resolution of the image; planes have no
        highlights.
    """

    def __init__(self, physics: Any):
        import_warp()
        if physics.model.nskin:
            raise ValueError(f"nskin={physics.model.nskin}: the ray caster draws no skins, use render backend 'mujoco'")
        if not physics.model.ncam:
            raise ValueError("ncam=0: the ray caster needs a model with a camera, use render backend 'mujoco'")
        self.physics = physics
        self._views: dict[tuple[int, int, bool], _View] = {}
        self._scene: _Scene | None = None

    def render(
        self, height: int, width: int, camera: int | str = 0, *, shadows: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws the current state.

        Args:
            height: pixels, at least 1.
            width: pixels, at least 1.
            camera: index or name, -1 for the free camera.
            shadows: let the lights cast shadows.

        Returns:
            The image, uint8 `[height, width, 3]`, and what is seen at each pixel, int32 `[height, width, 2]`: the id
            and the type (`mujoco.mjtObj`) of the object, (-1, -1) for the sky. Both belong to the caller.

        Raises:
            ValueError: there is no such camera, or a size is below 1.
        """
        check_positive("height", height)
        check_positive("width", width)
        model = self.physics.model.ptr
        if self._scene is None or self._scene.model is not model:  # a task may load another model
            self._scene, self._views = _Scene(model), {}
        self._scene.update(self.physics.data.ptr)
        view = self._views.get((height, width, shadows))
        if view is None:
            view = self._views[height, width, shadows] = _View(self._scene, height, width, shadows)
        return view.render(self.physics.data.ptr, self._camera_id(camera))

    def _camera_id(self, camera: int | str) -> int:
        model = self.physics.model
        if isinstance(camera, str):
            names = [model.id2name(index, "camera") for index in range(model.ncam)]
            if camera in names:
                return names.index(camera)
        elif -1 <= camera < model.ncam:
            return camera
        raise ValueError(f"camera={camera!r}: choose a name of the model or an index from -1 to {model.ncam - 1}")


class _Scene:
    """What there is to draw, in slots: the visible geoms, then the sites, then the segments of tendons."""

    def __init__(self, model: Any):
        mujoco = _import_mujoco()
        self.model = model
        self.geoms = np.flatnonzero(model.geom_group < VISIBLE_GROUPS)
        self.sites = np.flatnonzero(model.site_group < VISIBLE_GROUPS)
        spatial = model.wrap_type[model.tendon_adr] != mujoco.mjtWrap.mjWRAP_JOINT
        tendons = np.flatnonzero(spatial & (model.tendon_group < VISIBLE_GROUPS))
        segments = TENDON_SEGMENTS * len(tendons)
        kinds = ((GEOM, len(self.geoms)), (SITE, len(self.sites)), (TENDON, segments))
        count = sum(number for _, number in kinds)
        self.owners = np.full((count + 1, 2), -1, np.int32)  # slot -> (id, type); the last is the sky
        self.owners[:-1, 0] = np.concatenate([self.geoms, self.sites, np.zeros(segments, np.int32)])
        self.owners[:-1, 1] = np.repeat([kind for kind, _ in kinds], [number for _, number in kinds])
        self.kinds = np.concatenate(
            [model.geom_type[self.geoms], model.site_type[self.sites], np.full(segments, CAPSULE)]
        ).astype(np.int32)
        self.data_ids = np.full(count, -1, np.int32)
        self.data_ids[: len(self.geoms)] = model.geom_dataid[self.geoms]
        self.position = np.zeros((count, 3), np.float32)
        self.rotation = np.tile(np.eye(3, dtype=np.float32), (count, 1, 1))  # [S, 3, 3]
        self.size = np.zeros((count, 3), np.float32)
        self.rgba = np.zeros((count, 4), np.float32)
        self.material = np.full(count, -1, np.int32)
        self._reach = np.zeros(count)  # of meshes and height fields, whose sizes do not say it
        self._reach[: len(self.geoms)] = model.geom_rbound[self.geoms]
        self._tendon_scene = mujoco.MjvScene(model, maxgeom=max(segments, 1))
        self._tendon_options = mujoco.MjvOption()
        self._tendon_options.geomgroup[:] = 0
        self._tendon_options.sitegroup[:] = 0

    @property
    def count(self) -> int:
        return len(self.kinds)

    def update(self, data: Any) -> None:
        """Reads poses and looks."""
        model, first, last = self.model, len(self.geoms), len(self.geoms) + len(self.sites)
        for part, ids, kind in ((slice(0, first), self.geoms, "geom"), (slice(first, last), self.sites, "site")):
            if len(ids):
                self.position[part] = getattr(data, f"{kind}_xpos")[ids]
                self.rotation[part] = getattr(data, f"{kind}_xmat")[ids].reshape(-1, 3, 3)
                self.size[part] = getattr(model, f"{kind}_size")[ids]
                self.material[part] = material = getattr(model, f"{kind}_matid")[ids]
                self.rgba[part] = _resolve_colours(getattr(model, f"{kind}_rgba")[ids], material, model.mat_rgba)
        if last < self.count:
            self._update_tendons(data, last)

    def free_depth(self, origin: np.ndarray, forward: np.ndarray, corners: np.ndarray) -> float:
        """A lower bound of the depth of all that a camera sees.

        Args:
            origin: place of the camera, [3].
            forward: unit vector along its axis, [3].
            corners: directions to the corners of the image, of depth 1, [4, 3].
        """
        drawn, planes = self.rgba[:, 3] > 0, self.kinds == PLANE
        solid = drawn & ~planes
        depth, reach = (self.position[solid] - origin) @ forward, np.maximum(self.size.sum(-1), self._reach)[solid]
        free = (depth - reach)[depth + reach > 0].min(initial=1e6)
        for slot in np.flatnonzero(drawn & planes):
            normal = self.rotation[slot, :, 2]
            height, approach = normal @ (self.position[slot] - origin), corners @ normal
            free = min(free, (height / approach[approach * height > 0]).min(initial=1e6))
        return max(float(free), 0.0)

    def _update_tendons(self, data: Any, first: int) -> None:
        mujoco = _import_mujoco()
        scene, options, every = self._tendon_scene, self._tendon_options, mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, options, None, mujoco.MjvCamera(), every, scene)
        self.rgba[first:] = 0  # not drawn
        slot = first
        for index in range(scene.ngeom):
            geom = scene.geoms[index]
            if geom.objtype == TENDON and geom.type == CAPSULE and slot < self.count:
                self.position[slot], self.rotation[slot], self.size[slot] = geom.pos, geom.mat, geom.size
                self.size[slot, 1] = geom.size[2]  # a drawn capsule has its half length last, one of a model second
                self.rgba[slot], self.material[slot] = geom.rgba, geom.matid
                self.owners[slot, 0] = geom.objid
                slot += 1


def _resolve_colours(rgba: np.ndarray, material: np.ndarray, materials: np.ndarray) -> np.ndarray:
    """The colour of an object is that of its material, unless it has one of its own."""
    if not len(materials):
        return rgba
    unset = (material >= 0) & (rgba == (0.5, 0.5, 0.5, 1.0)).all(-1)
    return np.where(unset[:, None], materials[material], rgba)


class _View:
    """The buffers and the kernel for one image size."""

    def __init__(self, scene: _Scene, height: int, width: int, shadows: bool):
        mujoco = _import_mujoco()
        warp, mujoco_warp = import_warp()
        self._warp, self._mujoco_warp, self._scene = warp, mujoco_warp, scene
        self._height, self._width = height, width
        self._camera, self._camera_scene = mujoco.MjvCamera(), mujoco.MjvScene(scene.model, maxgeom=1)
        self._frustum: tuple[float, ...] = ()
        with warp.ScopedDevice("cpu"):
            self._model = mujoco_warp.put_model(scene.model)
            self._data = mujoco_warp.make_data(scene.model)
            self._context = mujoco_warp.create_render_context(
                scene.model,
                cam_res=(width, height),
                cam_active=[0],  # a place for the pose of any camera
                render_rgb=True,
                render_depth=False,
                render_seg=True,
                use_shadows=shadows,
                render_skybox=True,
            )
            self._add_slots()
            self._build_tree()
            self._dull_planes()
            self._shrink_sky()
        # The renderer's own memory, on the CPU.
        self._position, self._rotation = self._data.cam_xpos.numpy()[0, 0], self._data.cam_xmat.numpy()[0, 0]
        self._lights = self._data.light_xpos.numpy()[0], self._data.light_xdir.numpy()[0]
        self._rays, self._starts = self._context.ray.numpy(), self._context.ray_offset.numpy()
        self._packed = self._context.rgb_data.numpy().view(np.uint8)
        self._hits = self._context.seg_data.numpy()

    def _add_slots(self) -> None:
        """Puts arrays with a row per slot where the renderer looks for the geoms of the model."""
        warp, scene, context = self._warp, self._scene, self._context

        def share(array: np.ndarray, dtype: Any) -> Any:
            return warp.array(array, dtype=dtype, copy=False)

        self._model = dataclasses.replace(
            self._model,
            geom_type=share(scene.kinds, int),
            geom_dataid=share(scene.data_ids[None], int),
            geom_matid=share(scene.material[None], int),
            geom_size=share(scene.size[None], warp.vec3),
            geom_rgba=share(scene.rgba[None], warp.vec4),
        )
        self._data = dataclasses.replace(
            self._data,
            geom_xpos=share(scene.position[None], warp.vec3),
            geom_xmat=share(scene.rotation[None], warp.mat33),
        )
        context.enabled_geom_ids = warp.array(np.arange(scene.count), dtype=int)
        context.bvh_ngeom = scene.count
        context.lower = warp.zeros(scene.count, dtype=warp.vec3)
        context.upper = warp.zeros(scene.count, dtype=warp.vec3)
        context.group = warp.zeros(scene.count, dtype=int)
        # One kernel for all models of simple shapes, instead of one to compile for each.
        context.geom_ray_types = tuple(sorted({*SIMPLE_SHAPES, *map(int, scene.kinds)}))
        context.znear = context.zfar = 0.0  # without a limit
        context.has_orthographic_camera = True  # rays may start elsewhere than at the camera

    def _build_tree(self) -> None:
        """Builds the tree that rays are tested against around the first state; it is refitted for each image."""
        from mujoco_warp._src.bvh import build_scene_bvh

        scene, model = self._scene, self._scene.model
        slots = SimpleNamespace(
            ngeom=scene.count,
            geom_type=scene.kinds,
            geom_dataid=scene.data_ids,
            geom_size=scene.size,
            geom_xpos=scene.position,
            geom_xmat=scene.rotation,
            flex_vertadr=model.flex_vertadr,
            flex_vertnum=model.flex_vertnum,
            flex_edge=model.flex_edge,
            flex_radius=model.flex_radius,
            flexvert_xpos=np.zeros((model.nflexvert, 3)),
        )
        build_scene_bvh(slots, slots, self._context, 1)

    def _dull_planes(self) -> None:
        """Takes the highlights off planes, as OpenGL does: it has them only where there are vertices."""
        model = self._scene.model
        planes = model.geom_type == PLANE
        materials = np.setdiff1d(model.geom_matid[planes], model.geom_matid[~planes])
        self._model.mat_specular.numpy()[:, materials[materials >= 0]] = 0.0

    def _shrink_sky(self) -> None:
        """Averages the sky texture down to about one texel per pixel."""
        model, context = self._scene.model, self._context
        skies = np.flatnonzero(model.tex_type == SKYBOX)
        if not context.render_skybox or not len(skies):
            return
        sky = skies[0]
        side, channels, start = model.tex_width[sky], model.tex_nchannel[sky], model.tex_adr[sky]
        if start < 0 or model.tex_height[sky] != 6 * side:  # in a file, or one face for all
            return
        # The image shows about half a face from top to bottom.
        block = next(size for size in range(1, side + 1) if side % size == 0 and side // size <= 2 * self._height)
        texels = model.tex_data[start : start + 6 * side * side * channels]
        texels = texels.reshape(6 * side // block, block, side // block, block, channels).mean((1, 3)) / 255.0
        sky_texels = np.ones((*texels.shape[:2], 4), np.float32)
        sky_texels[..., :channels] = texels
        warp = self._warp
        texture = warp.Texture2D(warp.array(sky_texels, dtype=float), filter_mode=warp.TextureFilterMode.LINEAR)
        context.textures_registry[sky] = texture
        context.textures = warp.array(context.textures_registry, dtype=warp.Texture2D)
        context.skybox_face_width = warp.array([side // block], dtype=int)

    def _aim(self, data: Any, camera: int) -> None:
        """Moves the camera, and makes other rays if its angle of view has changed."""
        mujoco = _import_mujoco()
        model, placed = self._scene.model, self._camera
        if camera < 0:
            mujoco.mjv_defaultFreeCamera(model, placed)
        else:
            placed.type, placed.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, camera
        mujoco.mjv_updateCamera(model, data, placed, self._camera_scene)
        left, right = self._camera_scene.camera  # of a pair of eyes
        forward, up = np.array(left.forward), np.array(left.up)
        self._position[:] = (left.pos + right.pos) / 2
        self._rotation[:] = np.stack([np.cross(forward, up), up, -forward], axis=-1)
        frustum = (left.frustum_near, left.frustum_top, left.frustum_bottom)
        if frustum != self._frustum:
            self._frustum = frustum
            self._rays[:] = rays = _make_rays(*frustum, self._height, self._width)
            self._depth_rays = rays / -rays[:, 2:]  # of depth 1
            grid = self._depth_rays.reshape(self._height, self._width, 3)
            self._corners = grid[[0, 0, -1, -1], [0, -1, 0, -1]]
        # Single precision is not enough for small things far away: let the rays start just before the first of them.
        free = self._scene.free_depth(self._position, forward, self._corners @ self._rotation.T)
        np.multiply(self._depth_rays, START * free, out=self._starts, casting="same_kind")

    def render(self, data: Any, camera: int) -> tuple[np.ndarray, np.ndarray]:
        warp, scene, context = self._warp, self._scene, self._context
        self._aim(data, camera)
        self._lights[0][:], self._lights[1][:] = data.light_xpos, data.light_xdir
        with warp.ScopedDevice("cpu"):
            self._mujoco_warp.refit_bvh(self._model, self._data, context)
            self._mujoco_warp.render(self._model, self._data, context)
        shape = (self._height, self._width)
        rgb = self._packed.reshape(*shape, 4)[..., 2::-1].copy()  # [h, w, 3], stored as blue, green, red, alpha
        slots = self._hits[..., 0].reshape(shape)  # -1 for the sky
        return rgb, scene.owners[slots]


def _make_rays(near: float, top: float, bottom: float, height: int, width: int) -> np.ndarray:
    """Unit vectors through the centres of the pixels, in the frame of the camera, [height * width, 3]."""
    half_width = (top - bottom) / 2 * width / height
    x = half_width * ((np.arange(width) + 0.5) / width * 2 - 1)
    y = top + (bottom - top) * (np.arange(height) + 0.5) / height
    rays = np.stack([*np.meshgrid(x, y), np.full((height, width), -near)], axis=-1)  # [h, w, 3]
    return (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).reshape(-1, 3)
